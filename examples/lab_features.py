"""What features of an encoder tell of lab and label, by neighbors and by linear probes, for robustness_index.py."""

from collections.abc import Sequence

import numpy as np
from lab_figures import weighted_auc
from lab_images import Labeled
from lab_models import PROBE_C
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS = 5
Figures = dict[str, np.ndarray]


def measure(
    features: np.ndarray, images: Sequence[Labeled], neighbors: int, asked: str, seed: int, resamples: int
) -> Figures:
    """Figures (1 + R,) of features (N, F): of all images, and of R resamples.

    Neighbors and probes stay those of all images: of resamples, their answers are counted as often as images are drawn.
    Resamples depend on nothing but images and seed, so that those of two methods can be compared one by one.

    Args:
        features: of the images.
        images: of two labs or more. Where all have one label, neighbors are counted whatever their label.
        neighbors: how many of each image.
        asked: the lab whose neighbors are counted where all have one label.
        seed: of the resamples and of the folds.
        resamples: R.
    """
    labs = np.unique([image.lab for image in images], return_inverse=True)[1]
    labels = np.array([image.label for image in images])
    units = np.array([image.unit for image in images])
    drawn = resampled(labs, units, resamples, seed)
    told = {"lab told": auc(labs, held_out(features, labs, units, seed), drawn)}
    if len(set(labels)) == 1:
        rows = np.array([image.lab == asked for image in images])
        share, chance = other_labs(features, labs, units, neighbors)[:, rows]
        return {name: ratio(values, np.ones_like(values), drawn[:, rows]) for name, values in
                (("neighbors from another lab", share), ("chance", chance))} | told  # fmt: skip
    good, bad = same_and_other(features, labs, labels, units, neighbors)
    across, inside = [], []
    for lab in np.unique(labs):
        own = labs == lab
        inside.append(auc(labels[own], held_out(features[own], labels[own], units[own], seed), drawn[:, own]))
        fitted = probe().fit(features[own], labels[own])
        for other in np.unique(labs[~own]):
            rows = labs == other
            across.append(auc(labels[rows], fitted.predict_proba(features[rows]), drawn[:, rows]))
    return {"robustness index": ratio(good, good + bad, drawn)} | told | {
        "tumor across": np.mean(across, axis=0), "inside": np.mean(inside, axis=0)
    }  # fmt: skip


def resampled(labs: np.ndarray, units: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn, (1 + R, N): once, then with its unit, as those of a lab are with replacement."""
    generator = np.random.default_rng(seed)
    drawn = np.ones((1 + resamples, len(labs)), int)
    for lab in np.unique(labs):
        names, unit_of = np.unique(units[labs == lab], return_inverse=True)
        choices = generator.integers(len(names), size=(resamples, len(names)))
        drawn[1:, labs == lab] = [np.bincount(row, minlength=len(names))[unit_of] for row in choices]
    return drawn


def ratio(part: np.ndarray, whole: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Of sums over images (N,), as often as each is drawn; NaN where there is nothing."""
    with np.errstate(invalid="ignore"):
        return (drawn @ part) / (drawn @ whole)


# --- Neighbors.


def nearest(features: np.ndarray, units: np.ndarray, neighbors: int) -> np.ndarray:
    """The images whose features are most similar to those of each, by cosine, none of its own slide; (N, neighbors)."""
    distance = 1 - cosine_similarity(features)
    distance[units[:, None] == units] = np.inf
    return distance.argsort(axis=1, kind="stable")[:, :neighbors]


def same_and_other(
    features: np.ndarray, labs: np.ndarray, labels: np.ndarray, units: np.ndarray, neighbors: int
) -> np.ndarray:
    """Neighbors of each image of its label from another lab, and of another label from its lab; (2, N).

    The robustness index is the sum of the former over the sum of both (PathoROB, arXiv 2507.17845).
    """
    order = nearest(features, units, neighbors)
    same_lab, same_label = labs[order] == labs[:, None], labels[order] == labels[:, None]
    return np.stack([(same_label & ~same_lab).sum(axis=1), (same_lab & ~same_label).sum(axis=1)])


def other_labs(features: np.ndarray, labs: np.ndarray, units: np.ndarray, neighbors: int) -> np.ndarray:
    """Share of other labs in the neighbors of each image, and in all images that are not of its slide; (2, N)."""
    order = nearest(features, units, neighbors)
    other = labs[:, None] != labs
    return np.stack(
        [
            np.take_along_axis(other, order, axis=1).mean(axis=1),
            other.sum(axis=1) / (units[:, None] != units).sum(axis=1),
        ]
    )


# --- Linear probes.


def probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=1000))


def held_out(features: np.ndarray, classes: np.ndarray, units: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities (N, C) of the classes 0 to C - 1, of each image by a probe that has not seen its slide.

    Raises:
        ValueError: slides of a class are so few, or so uneven, that none are left to fit to.
    """
    folds = min(FOLDS, *(len(set(units[classes == each])) for each in set(classes)))
    splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, classes, units))
    if any(len(set(classes[rows])) < len(set(classes)) for rows, _ in splits):
        raise ValueError(
            f"expected images of each lab and label on other slides when one of {folds} parts is held out, got none: "
            "give more slides, or leave a label or lab out"
        )
    return cross_val_predict(probe(), features, classes, cv=splits, method="predict_proba")


def auc(classes: np.ndarray, scores: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Of each class against the others, and the mean of these, for each row of ``drawn``."""
    return np.mean([list(weighted_auc((classes == each) * 1, scores[:, each], drawn)) for each in set(classes)], axis=0)
