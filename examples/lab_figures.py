"""The figures of classify_labs.py: those of one model in one lab, and the table and plot of all models."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab_colors import METHODS
from sklearn.metrics import roc_auc_score

from stainnorm_transform.files import replacing

RESAMPLES = 1000
BINS = 15
Run = dict[str, Any]

LEGEND = """
AUC inside: images of the training lab that were held out; across: all images of every other lab, mean over pairs of
labs. ± standard deviation over seeds, of the split, the model and the reference. 95 %: bootstrap interval over {units}
of the other labs. Above nothing: difference of the AUC across, resampled alike. ECE: expected calibration error,
{bins} bins, inside and across. n: images.
"""


def measure(labels: np.ndarray, scores: np.ndarray, units: Sequence[str]) -> Run:
    """Figures of the probabilities (N,) that labels (N,) are 1; ``units`` are what is resampled: slides, or images.

    Resamples depend on nothing but the units, so that those of two methods can be compared one by one.
    """
    names, unit_of = np.unique(np.asarray(units), return_inverse=True)
    generator = np.random.default_rng(0)
    draws = (
        np.bincount(row, minlength=len(names)) for row in generator.integers(len(names), size=(RESAMPLES, len(names)))
    )
    return {
        "auc": float(roc_auc_score(labels, scores)),
        "ece": calibration_error(labels, scores),
        "images": len(labels),
        "units": len(names),
        "resampled": [
            None if np.isnan(auc) else round(auc, 4)
            for auc in weighted_auc(labels, scores, (draw[unit_of] for draw in draws))
        ],
    }


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: Iterable[np.ndarray]) -> Iterator[float]:
    """As ``roc_auc_score`` with each ``sample_weight``, many times as fast; NaN where only one label has weight."""
    _, place = np.unique(scores, return_inverse=True)
    for weight in weights:
        positive = np.bincount(place, weight * labels)
        negative = np.bincount(place, weight * (1 - labels))
        pairs = positive.sum() * negative.sum()
        yield float(positive @ (negative.cumsum() - negative / 2) / pairs) if pairs else float("nan")


def calibration_error(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean distance of the probability from the share of ones, in bins of equal width, weighted by their images."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(place, scores - labels, BINS)).sum() / len(scores))


def print_table(runs: Sequence[Run]) -> None:
    """One row a method, by its figures in ``summarize``."""
    rows = summarize(runs)
    pairs = sorted({pair for row in rows for pair in row["pairs"]}) if rows else []
    titles = [
        "method",
        "inside",
        "across",
        "95 %",
        "above nothing, 95 %",
        *(f"{a} to {b}" for a, b in pairs),
        "ECE inside",
        "across",
    ]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for row in rows:
        cells = [row["title"], spread(row["inside"]), spread(row["across"]), interval(row["resampled"])]
        cells += [difference(row, rows)]
        cells += [spread(row["pairs"][pair]) if pair in row["pairs"] else "" for pair in pairs]
        cells += [spread(row["ece inside"]), spread(row["ece across"])]
        print(f"| {' | '.join(cells)} |")
    tests = {lab: test for run in runs for lab, test in run["tests"].items() if lab != run["lab"]}
    units = "slides" if any(test["units"] < test["images"] for test in tests.values()) else "images"
    print(LEGEND.format(units=units, bins=BINS))
    for lab, test in tests.items():
        print(f"{lab}: n = {test['images']}, {test['units']} resampled apart")


def summarize(runs: Sequence[Run]) -> list[Run]:
    """Of each method the figures of every seed, as means over the training labs and the labs they are tested on."""
    rows = []
    for title in sorted({run["title"] for run in runs}, key=order_of):
        of_method = [run for run in runs if run["title"] == title]
        # Seeds that all training labs have.
        labs = {run["lab"] for run in of_method}
        seeds = sorted({run["seed"] for run in of_method})
        seeds = [seed for seed in seeds if {run["lab"] for run in of_method if run["seed"] == seed} == labs]
        if not seeds:
            continue
        by_seed = [[run for run in of_method if run["seed"] == seed] for seed in seeds]
        inside = [[run["tests"][run["lab"]] for run in group] for group in by_seed]
        across = [[t for run in group for lab, t in run["tests"].items() if lab != run["lab"]] for group in by_seed]
        rows.append(
            {
                "title": title,
                "seeds": seeds,
                "inside": means(inside, "auc"),
                "across": means(across, "auc"),
                "ece inside": means(inside, "ece"),
                "ece across": means(across, "ece"),
                "resampled": np.mean(
                    [np.array(test["resampled"], float) for group in across for test in group], axis=0
                ),
                "pairs": {
                    (run["lab"], lab): [each["tests"][lab]["auc"] for each in of_method if each["lab"] == run["lab"]]
                    for run in of_method
                    for lab in run["tests"]
                    if lab != run["lab"]
                },
            }
        )
    return rows


def order_of(title: str) -> tuple[int, str]:
    """As in ``METHODS``; titles have the library after the method's."""
    places = [
        place
        for place, method in enumerate(METHODS.values())
        if title == method.title or title.startswith(f"{method.title} (")
    ]
    return (places[0] if places else len(METHODS)), title


def means(groups: Sequence[Sequence[Run]], key: str) -> list[float]:
    return [float(np.mean([test[key] for test in group])) for group in groups]


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def interval(resampled: np.ndarray) -> str:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


def difference(row: Run, rows: Sequence[Run]) -> str:
    base = next((each for each in rows if each["title"] == METHODS["nothing"].title), None)
    if base is None or row is base or row["seeds"] != base["seeds"]:
        return ""
    change = np.mean(row["across"]) - np.mean(base["across"])
    return f"{change:+.3f}, {interval(row['resampled'] - base['resampled'])}"


def plot(runs: Sequence[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = summarize(runs)[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.9 + 0.42 * len(rows)), sharey=True, layout="constrained")
    for place, row in enumerate(rows):
        low, high = np.nanpercentile(row["resampled"], [2.5, 97.5])
        left.plot([low, high], [place, place], color="0.75", linewidth=5, solid_capstyle="butt", zorder=1)
        for axis, key in ((left, ""), (right, "ece ")):
            for where, color, marker in (("across", "C0", "o"), ("inside", "C1", "|")):
                values = row[key + where]
                label = None if place else {"across": "in other labs", "inside": "in the training lab"}[where]
                axis.scatter(values, [place] * len(values), 40, color, marker=marker, label=label, zorder=2)
    left.set_yticks(range(len(rows)), [row["title"] for row in rows])
    left.set_xlabel("AUC; bar: 95 % by bootstrap, across labs")
    right.set_xlabel("expected calibration error")
    right.legend(loc="best", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
