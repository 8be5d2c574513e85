"""Does stain normalization make a frozen encoder forget the lab? Measures it in the encoder's features, by method.

pip install -e ".[evidence]" && python examples/robustness_index.py tiles --json figures.json --plot features.png

A folder has images as LAB/LABEL/*.png (or jpg), or is CAMELYON17-WILDS; several are pooled. Names such as
SLIDE_x12_y34 say which slide an image is from: neighbors of the same slide do not count, and slides are held out as a
whole. As many images of each lab and label are drawn at random, several times. Labels that a lab lacks are left out.
With one label there is no robustness index (PathoROB, arXiv 2507.17845) and no tumor probe: all neighbors are counted.
An interrupted call goes on when it is given again with the same --json.
"""

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classify_labs import pool_of
from figures_file import check_outputs, earlier_figures, write_figures
from kornia.color import lab_to_rgb, rgb_to_lab
from lab_colors import METHODS, REFERENCED, change_of, with_library
from lab_features import measure
from lab_figures import RESAMPLES, interval, spread
from lab_images import Change, Data, Labeled, digest, draw, of_folders, of_wilds
from lab_models import LITE, embed, load_encoder
from sklearn.manifold import TSNE
from torch import Tensor
from torchvision.transforms.v2.functional import equalize, gaussian_blur
from tqdm import tqdm

from stainnorm_transform import __version__, weights
from stainnorm_transform.cli.options import add_device, path_name
from stainnorm_transform.files import replacing
from stainnorm_transform.resources import choose_device

MOST = 500  # images of a lab and label, unless --limit says otherwise
BLUR = 2 / 256  # standard deviation, for each pixel of the side
WILDS = ("normal", "tumor")
COLUMNS = 6  # of the picture

LEGEND = """
Mean over {draws} draws ± their standard deviation; 95 %: bootstrap interval over {units} and draws.
Lab told: AUC of a logistic regression, {units} held out; chance is 0.5, and lower is better."""
OF_LABELS = """Robustness index: neighbors of the same label from another lab, over these and those of another label
from the same lab; {neighbors} of each image. Tumor: AUC of a logistic regression that is trained in one lab; across: in
the others; inside: in the same, {units} held out."""
OF_ONE = "Neighbors from another lab: of the {neighbors} of each image of {asked}; in brackets by chance."


def gray(images: Tensor) -> Tensor:
    """L* alone, of uint8 images (N, 3, H, W)."""
    lab = rgb_to_lab(images.float() / 255)
    lab[:, 1:] = 0
    return (255 * lab_to_rgb(lab)).round().to(torch.uint8)[:, 1:2].expand_as(images).contiguous()


def blur(images: Tensor) -> Tensor:
    sigma = BLUR * min(images.shape[-2:])
    return gaussian_blur(images, [2 * int(3 * sigma) + 1] * 2, [sigma] * 2)


@dataclass(frozen=True)
class Way:
    """A method of ``lab_colors``, and what is done to the images after it."""

    title: str
    method: str
    after: Callable[[Tensor], Tensor] = lambda images: images


WAYS = {name: Way(method.title, name) for name, method in METHODS.items() if not method.augmentation} | {
    "colornormnet-blur": Way("ColorNormNet, a tile, then blur", "colornormnet", blur),
    "gray": Way("gray (L* alone)", "nothing", gray),
    "gray-equalized": Way("gray, equalized", "nothing", lambda images: equalize(gray(images))),
    "gray-blur": Way("gray, then blur", "nothing", lambda images: blur(gray(images))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=path_name, metavar="FOLDER", help="images of two labs or more")
    parser.add_argument(
        "--labels", nargs="+", default=["normal", "tumor"], metavar="LABEL", help="(default: normal tumor)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=WAYS, default=list(WAYS), metavar="METHOD",
        help=f"of {', '.join(WAYS)} (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", default=LITE, help="a model of timm, hf-hub:NAME or local-dir:PATH (default: %(default)s)"
    )
    parser.add_argument("--side", type=int, help="of the images, in pixels (default: what the encoder takes)")
    parser.add_argument("--neighbors", type=int, default=25, help="of each image (default: %(default)s)")
    parser.add_argument(
        "--weights", nargs="+", default=[weights.DEFAULT],
        help="names or files of the targets of ColorNormNet (default: camelyon17)",
    )  # fmt: skip
    parser.add_argument(
        "--references", nargs="+", metavar="LAB",
        help="labs whose images the methods that take a reference are given (default: that with most images)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int,
        help=f"draw at most so many images of each lab and label (default: as many as each has, at most {MOST})",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, default=5, help="how many times to draw (default: %(default)s)")
    parser.add_argument("--json", type=path_name, help="file to write all figures to")
    parser.add_argument("--plot", type=path_name, help="PNG file: features in two dimensions, by lab and by label")
    add_device(parser)
    options = parser.parse_args()
    try:
        evaluate(options)
    except ValueError as error:
        parser.error(str(error))


def evaluate(options: argparse.Namespace) -> None:
    for name in ("side", "neighbors", "limit", "draws"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"expected --{name} of 1 or more, got {getattr(options, name)}")
    check_outputs(options.json, options.plot)
    device = choose_device(options.device)
    found, labels = find(options.folders, options.labels)
    labs = Counter(image.lab for image in found)
    limit = options.limit or min(MOST, *Counter((image.lab, image.label) for image in found).values())
    draws = [draw(found, limit, seed) for seed in range(options.draws)]
    for drawn in draws:
        check(drawn, labels, options.neighbors)
    todo = list(plan(options.methods, options.weights, options.references or [labs.most_common(1)[0][0]], list(labs)))
    if not todo:
        raise ValueError('expected a method that is installed, got none: run pip install -e ".[evidence]"')
    encoder = load_encoder(options.encoder, options.side, device)
    images = sorted({image for drawn in draws for image in drawn}, key=lambda image: str(image.path))
    asked = min(labs, key=lambda lab: (labs[lab], lab))
    settings = {
        "version": __version__, "images": digest(images), "labels": labels,
        "encoder": [options.encoder, encoder.digest],
        "side": encoder.side, "neighbors": options.neighbors, "limit": limit, "draws": options.draws, "asked": asked,
        "labs": {lab: {"images": labs[lab], "units": len({x.unit for x in found if x.lab == lab})} for lab in labs},
        "units": "slides" if all(image.slide for image in images) else "images",
    }  # fmt: skip
    rows = earlier_figures(options.json, settings, "methods") if options.json and options.json.exists() else {}
    with pool_of(len(images)) as pool:
        for title, way, target in tqdm([each for each in todo if each[0] not in rows], unit="method", disable=None):
            of_target = [row for row, image in enumerate(images) if image.lab == target]
            change = change_of(METHODS[way.method].colors, images, of_target, 0, target, device, pool)
            data = Data([image.path for image in images], then(change, way.after), encoder.side, device, memory=0)
            features = dict(zip(images, embed(encoder, data), strict=True))
            rows[title] = figures_of(features, draws, options.neighbors, asked)
            if options.json:
                write_figures(options.json, settings, "methods", rows)
    rows = {title: rows[title] for title, *_ in todo}
    print_table(rows, settings)
    if options.plot:
        kinds = {"lab": [image.lab for image in draws[0]], "label": [labels[image.label] for image in draws[0]]}
        plot(rows, {kind: np.array(names) for kind, names in kinds.items() if len(set(names)) > 1}, options.plot)


def figures_of(
    features: dict[Labeled, np.ndarray], draws: Sequence[Sequence[Labeled]], neighbors: int, asked: str
) -> dict[str, Any]:
    """Each figure in each draw and its resamples; and the first draw's features in two dimensions, by t-SNE."""
    of_draws = [np.stack([features[image] for image in drawn]) for drawn in draws]
    figures = [
        measure(of_draw, drawn, neighbors, asked, seed, -(-RESAMPLES // len(draws)))
        for seed, (of_draw, drawn) in enumerate(
            zip(of_draws, tqdm(draws, "draws", leave=False, disable=None), strict=True)
        )
    ]
    row: dict[str, Any] = {
        name: {
            "draws": plain([each[name][0] for each in figures]),
            "resampled": plain(np.concatenate([each[name][1:] for each in figures])),
        }
        for name in figures[0]
    }
    perplexity = min(30, len(draws[0]) // 4)
    projection = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0)
    return row | {"points": projection.fit_transform(of_draws[0]).round(2).tolist()}


def then(change: Change, after: Callable[[Tensor], Tensor]) -> Change:
    return lambda batch, rows: after(change(batch, rows))


def find(folders: Sequence[Path], labels: Sequence[str]) -> tuple[list[Labeled], list[str]]:
    """The images of labels that all labs have, in the order of their paths, and these labels."""
    found = sorted((image for folder in folders for image in images_of(folder, labels)), key=lambda x: str(x.path))
    has = {lab: {image.label for image in found if image.lab == lab} for lab in sorted({x.lab for x in found})}
    if len(has) < 2:
        raise ValueError(
            f"expected images of two labs or more, got {', '.join(has) or 'none'} in {', '.join(map(str, folders))}: "
            f"give folders that hold LAB/LABEL/*.png, whose labels are {' and '.join(labels)} (--labels)"
        )
    shared = sorted(set.intersection(*has.values()))
    if not shared:
        got = "; ".join(f"{lab}: {' and '.join(labels[label] for label in sorted(has[lab]))}" for lab in has)
        raise ValueError(f"expected a label that all labs have, got {got}: give other --labels, or leave a lab out")
    for label in sorted(set().union(*has.values()) - set(shared)):
        lacking = " and ".join(lab for lab in has if label not in has[lab])
        print(f"left out: {labels[label]}, of which there are no images in {lacking}", file=sys.stderr)
    kept = [replace(image, label=shared.index(image.label)) for image in found if image.label in shared]
    return kept, [labels[label] for label in shared]


def images_of(folder: Path, labels: Sequence[str]) -> Iterator[Labeled]:
    if not (folder / "metadata.csv").is_file():
        yield from of_folders(folder, labels)
        return
    for image in of_wilds(folder):
        if (name := WILDS[image.label]) in labels:
            yield replace(image, label=labels.index(name))


def check(images: Sequence[Labeled], labels: Sequence[str], neighbors: int) -> None:
    """Raises ValueError where the images of a draw are too few."""
    others = len(images) - max(Counter(image.unit for image in images).values())
    if others < neighbors:
        raise ValueError(
            f"expected at least {neighbors} images that are not of the same slide, got {others}: "
            "give more images or slides, a larger --limit, or fewer --neighbors"
        )
    for lab, label in sorted({(image.lab, image.label) for image in images}):
        units = {image.unit for image in images if (image.lab, image.label) == (lab, label)}
        if len(units) < 2:
            raise ValueError(
                f"expected two slides or more of each lab and label, got {len(units)} of {labels[label]!r} in {lab}: "
                "give more slides or a larger --limit, or leave this label or lab out"
            )


def plan(
    methods: Sequence[str], targets: Sequence[str], references: Sequence[str], labs: Sequence[str]
) -> Iterator[tuple[str, Way, str]]:
    """(title, way, target) of the methods that can be had, for each of their targets: weights, or a lab."""
    for lab in references:
        if lab not in labs:
            raise ValueError(f"expected --references of labs that there are, {' or '.join(labs)}, got {lab!r}")
    for name in targets:
        try:
            weights.load(name)
        except OSError as error:
            raise ValueError(f"expected weights that are there, got {name!r} ({error})") from error
    for name in dict.fromkeys(methods):
        way, colors = WAYS[name], METHODS[WAYS[name].method].colors
        try:
            title = with_library(way.title, METHODS[way.method])
        except ModuleNotFoundError as error:
            print(f"left out: {way.title}, because {error}", file=sys.stderr)
            continue
        of_way = references if colors in REFERENCED else targets if colors in ("tile", "slide") else targets[:1]
        for target in dict.fromkeys(of_way):
            yield title if colors == "scanned" else f"{title}, to {target}", way, target


def plain(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def print_table(rows: dict[str, Any], settings: dict[str, Any]) -> None:
    names = [name for name in next(iter(rows.values())) if name not in ("chance", "points")]
    print(f"| method |{''.join(f' {name} | 95 % |' for name in names)}\n|{' --- |' * (1 + 2 * len(names))}")
    for title, row in rows.items():
        cells = [title]
        for name in names:
            chance = f" ({np.mean(row['chance']['draws']):.2f})" if name.startswith("neighbors") else ""
            draws, resampled = (np.array(row[name][each], float) for each in ("draws", "resampled"))
            cells += [spread(draws) + chance, interval(resampled) if np.isfinite(resampled).any() else "none"]
        print(f"| {' | '.join(cells)} |")
    print("\n".join([LEGEND, OF_ONE if "chance" in next(iter(rows.values())) else OF_LABELS]).format(**settings))
    for lab, counts in settings["labs"].items():
        print(f"{lab}: {counts['images']} images, {counts['units']} resampled apart")
    print(
        f"labels: {', '.join(settings['labels'])}; at most {settings['limit']} images of each lab and label in a draw"
    )


def plot(rows: dict[str, Any], kinds: dict[str, np.ndarray], path: Path) -> None:
    """The points (N, 2) of each method, in a panel for each kind of names (N,): lab, and label."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns) * len(kinds)
    size = 2.4 * columns, 2.5 * lines + 0.5
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (title, row) in enumerate(rows.items()):
        points = np.array(row["points"])
        for line, (kind, names) in enumerate(kinds.items()):
            axis = axes[place // columns * len(kinds) + line, place % columns]
            for number, name in enumerate(np.unique(names)):
                color = f"C{number + 8 * (kind == 'label')}"
                axis.scatter(*points[names == name].T, s=5, color=color, alpha=0.6, linewidths=0, label=name)
            axis.set_title("" if line else textwrap.fill(title, 28), fontsize=8)
            if place == 0:
                axis.legend(fontsize=7, frameon=False, markerscale=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
