"""Tables and a plot of what ``segment_nuclei.py`` measured."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stainnorm_transform.files import replacing

Run = dict[str, Any]
SCORES = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
SCORES_LEGEND = """
Mean over the test images of all seeds (n images); ± standard deviation over seeds of the mean of a seed. In brackets
the mean difference to "nothing" by image, ± its standard error, and in how many images it is better."""
ORGANS_LEGEND = """
Dice coefficient by organ (n images). Images of an organ that the network had not seen in training are counted apart."""
KEPT_LEGEND = """
Networks of "nothing": Dice coefficient in normalized test images, as a share of that before: mean over n images
± standard deviation over images, in brackets the mean after as a share of the mean before; then the worst image, and
how many are below 0.95. At dE 5 and 10: the change of each image scaled to that mean dE76 over its tissue; stretched:
how many images had to be changed by more than the method does."""
WORST = 5


def print_tables(runs: list[Run], labels: dict[str, str]) -> None:
    print_scores(runs, labels)
    print_organs(runs, labels)
    print_kept(runs)
    print_worst(runs)


def print_table(columns: list[str], rows: Iterable[list[str]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def scores_of(runs: list[Run], method: str, score: str) -> dict[tuple[int, str], float]:
    """By seed and image."""
    return {(run["seed"], row["image"]): row[score] for run in runs if run["method"] == method for row in run["scores"]}


def over_seeds(values: dict[tuple[int, str], float]) -> tuple[float, float]:
    """Mean over images, and the standard deviation over seeds of their means, NaN for one seed."""
    seeds = defaultdict(list)
    for (seed, _), value in values.items():
        seeds[seed].append(value)
    means = [np.mean(group) for group in seeds.values()]
    return float(np.mean(list(values.values()))), float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")


def plus_minus(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" if np.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def print_scores(runs: list[Run], labels: dict[str, str]) -> None:
    rows = []
    for method, label in labels.items():
        cells = [label]
        for score in SCORES:
            values, base = (scores_of(runs, name, score) for name in (method, "nothing"))
            if not values:
                break
            mean, deviation = over_seeds(values)
            cell = plus_minus(mean, deviation)
            gains = [values[key] - base[key] for key in values.keys() & base.keys()]
            if method != "nothing" and len(gains) > 1:
                error = np.std(gains, ddof=1) / len(gains) ** 0.5
                cell += f" ({np.mean(gains):+.3f} ± {error:.3f}, {sum(gain > 0 for gain in gains)} better)"
            cells.append(cell)
        else:
            rows.append([*cells[:1], str(len(values)), *cells[1:]])
    print(SCORES_LEGEND)
    print_table(["method", "n", *SCORES.values()], rows)


def print_organs(runs: list[Run], labels: dict[str, str]) -> None:
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in run["scores"]:
            organ = row["organ"] if row["organ"] in run["organs"] else f"{row['organ']}, not in training"
            cells[organ][run["method"]].append(row["dice"])
    methods = [method for method in labels if any(method in row for row in cells.values())]
    print(ORGANS_LEGEND)
    print_table(
        ["organ", "n", *(labels[method] for method in methods)],
        (
            [organ, str(max(map(len, row.values()))), *(f"{np.mean(row[m]):.3f}" if m in row else "" for m in methods)]
            for organ, row in sorted(cells.items())
        ),
    )


def kept_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Of images in which the network found something."""
    return [
        {**row, "kept": row["after"] / row["before"]} for run in runs for row in run.get("kept", []) if row["before"]
    ]


def groups(rows: list[dict[str, Any]]) -> dict[str, dict[float | None, list[dict[str, Any]]]]:
    """By normalizer and change."""
    found: dict[str, dict[float | None, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["normalizer"]][row["change"]].append(row)
    return found


def print_kept(runs: list[Run]) -> None:
    by_normalizer = groups(kept_rows(runs))
    if not by_normalizer:
        return
    changes = list(next(iter(by_normalizer.values())))
    table = []
    for name, by_change in by_normalizer.items():
        cells = [name, str(len(by_change[None])), f"{np.mean([row['dE'] for row in by_change[None]]):.1f}"]
        for change in changes:
            kept, before, after = ([row[key] for row in by_change[change]] for key in ("kept", "before", "after"))
            cell = plus_minus(np.mean(kept), np.std(kept, ddof=1) if len(kept) > 1 else np.nan)
            cell += f" ({sum(after) / sum(before):.3f}), {min(kept):.2f}, {sum(share < 0.95 for share in kept)} below"
            if change is not None:
                cell += f", {sum(row['share'] > 1 for row in by_change[change])} stretched"
            cells.append(cell)
        table.append(cells)
    print(KEPT_LEGEND)
    print_table(["method", "n", "mean dE", "as it is", *(f"at dE {change}" for change in changes[1:])], table)


def print_worst(runs: list[Run]) -> None:
    """The images of which most nuclei are lost, by normalizer."""
    by_normalizer = groups(kept_rows(runs))
    if by_normalizer:
        print(f"\nThe {WORST} images that keep least, of each method as it is:")
    for name, by_change in by_normalizer.items():
        worst = sorted(by_change[None], key=lambda row: row["kept"])[:WORST]
        cells = (f"{row['image']} ({row['organ']}, dE {row['dE']:.0f}): {row['kept']:.2f}" for row in worst)
        print(f"- {name}: {', '.join(cells)}")


def plot(runs: list[Run], labels: dict[str, str], path: Path) -> None:
    """Scores by method, and what is kept by the change of color."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), layout="constrained")
    methods = [method for method in labels if scores_of(runs, method, "dice")]
    for offset, (score, label) in enumerate(SCORES.items()):
        figures = [over_seeds(scores_of(runs, method, score)) for method in methods]
        places = np.arange(len(methods)) + 0.25 * (offset - 1)
        left.errorbar(
            [mean for mean, _ in figures], places, xerr=[deviation for _, deviation in figures], fmt="o", label=label
        )
    left.set_yticks(range(len(methods)), [labels[method] for method in methods])
    left.invert_yaxis()
    left.set_xlabel("mean over test images, ± standard deviation over seeds")
    left.grid(alpha=0.3)
    left.legend()
    for number, (name, by_change) in enumerate(groups(kept_rows(runs)).items()):
        points = sorted(
            (
                np.mean([row["dE"] for row in rows]),
                sum(row["after"] for row in rows) / sum(row["before"] for row in rows),
            )
            for rows in by_change.values()
        )
        right.plot(*zip(*points, strict=True), marker="o", label=name, color=plt.get_cmap("tab20")(number % 20))
    right.axhline(0.95, color="gray", linestyle=":")
    right.set_xlabel("mean change of the tissue, dE76")
    right.set_ylabel("mean Dice coefficient, as a share of that before")
    right.grid(alpha=0.3)
    if right.lines[1:]:
        right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
