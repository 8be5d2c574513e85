"""Compares ColorNormNet with Reinhard, Macenko, Vahadane and a control without a network on CAMELYON17.

pip install -e ".[compare]" && python examples/compare_camelyon17.py --plot centers.png

For each target center, the images of the other four are normalized. The peers take a single tile of the target, drawn
at random, or a mosaic of all its images (pooled). The control matches the mean a*, b* of an image's tissue to that of
the target's images, white preserved. Peers that are not installed are left out.
"""

import argparse
import importlib.util
import json
import logging
import multiprocessing
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from camelyon17 import CENTER_FOLDERS, CENTERS, add_data_option, read, read_center
from peers import PEERS, TISSUE, Normalize, lab_of, mean_match, tissue, tissue_mean
from skimage.color import hed2rgb, rgb2hed
from skimage.metrics import structural_similarity
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm
from train_camelyon17 import left_out_of

from stainnorm_transform import NormalizeStain, weights
from stainnorm_transform.cli.options import path_name
from stainnorm_transform.color import random_offset, shift_ab

SIDE = 512  # of the tiles compared; of a large field, the middle
STROMA, GLASS = (60, 80), 90  # L*
NUCLEI = 0.1  # the darkest of the tissue
STEP = 2  # of MoNuSeg's images, every so many pixels are measured
BINS = torch.arange(TISSUE[0], TISSUE[1], 6.0)  # L*
CHANGES = 4  # known ones for each target tile
OURS, CONTROL, PAPER = "ColorNormNet", "mean match (control)", "ColorNormNet, paper's shift and optimizer"
OFFSET = "ColorNormNet, offset only"
Figures = dict[str, float]

COLUMNS = {
    "distance": "distance",
    "equal_lightness": "at equal L*",
    "nuclei": "nuclei",
    "stroma": "stroma",
    "spread": "spread",
    "nmi": "NMI sd",
    "told_apart": "told apart",
    "known_offset": "known offset",
    "known_stain": "known stain",
    "clipped": "clipped %",
    "glass": "glass dE",
    "ssim": "SSIM L*",
    "raised": "raised",
    "failed": "failed",
    "black": "black",
    "tinted": "tinted",
    "monuseg": "MoNuSeg nuclei",
    "farther": "farther",
    "teal": "teal %",
}
BY_TARGET = {
    "distance": "Distance",
    "nuclei": "Distance of nuclei",
    "stroma": "Distance of stroma",
    "monuseg": "Distance of MoNuSeg's nuclei",
}
LEGEND = """
n = 24 images of the 4 centers that are not the target, unless said. In brackets the standard deviation over targets,
then over draws of the reference or seeds of the training. Methods that match means win distance and spread by
definition.
distance     of the tissue's mean (a*, b*) to the target's: centers, then their mean
at equal L*  the same within bins of L*, so that more nuclei do not count as another color
nuclei, stroma  the same of the darkest tenth of the tissue, and of its L* from 60 to 80
spread       standard deviation of the images' (a*, b*) within a center
NMI sd       standard deviation over images of the normalized median intensity
told apart   share of 30 images whose center a classifier tells from the Lab statistics of the tissue; chance 0.20
known offset mean error of the tissue's a*, b* after a shift as ColorNormNet is trained on, up to 30; 6 target images
known stain  the same after hematoxylin and eosin were scaled by 0.7 to 1.4
clipped %    tissue pixels that reach 0 or 255 only by normalizing
glass dE     dE76 of pixels with L* > 90, in images that have 0.1 % of them; the offset fades out at 97
SSIM L*      structure kept; 1 by construction where L* is not touched
raised       of the 24 images; they count as left as they are
failed, black, tinted  of 32 odd images (edge_cases): an exception or NaN; much darker; blank or with pen and dE > 10
MoNuSeg nuclei  distance of the darkest tenth of the tissue to the target's, mean of 30 images of other organs and labs;
             how many are farther than before; pixels of them with G > R + 2 (teal)
ColorNormNet, offset only  takes away what the map does to the mean color, from all colors alike
Vahadane of tiatoolbox warns that it is unstable with the scikit-learn of today.
"""
SLIDES = """
Radboud's {slides} slides of CAMELYON16, {tiles} tiles in all, target center {target}, one map a slide. Spread: standard
deviation over slides of the mean a*, b* of the tissue; distance: of their mean to the target's.
"""
SKIN = """
A slide of skin (small_HE.svs), target center {target}: dE76 over the tissue between a tile of 256 pixels normalized
alone and by the slide's map, {tiles} tiles with 2 % tissue: mean {mean:.1f}, largest {most:.1f}; with offsets only
{mean_offset:.1f}, {most_offset:.1f}.
"""
SEAMS = """
Tiles of one slide, target center {target}, pooled references: mean dE76 over the tissue between a tile that was
normalized alone and the same tile within its field, normalized at once. Of the 16 tiles of a field, those with the most
L* > 88, 60 to 80, and < 45; mean and standard deviation over the fields of the 4 other centers. With one offset for the
slide (for_slide) ColorNormNet has 0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, needed=(*CENTER_FOLDERS, "edge_cases", "monuseg/images"))
    parser.add_argument("--draws", type=int, default=3, help="single reference tiles (default: %(default)s)")
    parser.add_argument("--targets", type=int, nargs="+", choices=CENTERS, default=list(CENTERS), metavar="CENTER")
    parser.add_argument(
        "--seeds", type=path_name, nargs="*", default=[], help="folders with NAME.safetensors trained with other seeds"
    )
    parser.add_argument(
        "--folds",
        type=path_name,
        help="folder with the networks that train_camelyon17.py --keep-folds wrote, for the known changes",
    )
    parser.add_argument("--processes", type=int, default=2, help="one core each (default: %(default)s)")
    parser.add_argument("--json", type=path_name, help="file to write all figures to")
    parser.add_argument("--plot", type=path_name, help="PNG file for the tissue colors before and after")
    options = parser.parse_args()
    for folder in options.seeds:
        for target in options.targets:
            weights.load(folder / f"camelyon17-center{target}.safetensors")
    quiet()
    centers = [read_center(options.data, center) for center in CENTERS]
    tiles = [[middle(image) for image in images.values()] for images in centers]
    # One target to a core.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, initializer=quiet) as pool:
        jobs = [pool.submit(compare, target, tiles, list(centers[target]), options) for target in options.targets]
        results = [row for job in tqdm(jobs, unit="target", disable=None) for row in job.result()]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    print_by_target(results, tiles)
    print_seams(centers, tiles, options)
    print_slides(tiles, options.data)
    print_skin(options.data)
    if options.plot:
        plot(tiles, options.plot)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 - scikit-learn's dictionary learning, in tiatoolbox's Vahadane, draws from it.


def compare(target: int, tiles: list[list[Tensor]], names: list[str], options: argparse.Namespace) -> list[Figures]:
    """The figures of every method and draw; a method that cannot be made has only ``cannot``."""
    odd = {path.stem: read(path) for path in sorted((options.data / "edge_cases").iterdir()) if path.suffix != ".csv"}
    organs = [read(path) for path in sorted((options.data / "monuseg/images").iterdir())]
    rows = []
    for method, draw, make in methods(target, options):
        row = {"method": method, "target": target, "draw": draw}
        try:
            normalize = make(tiles[target])
            row |= measure(normalize, tiles, target) | known_changes(
                method, target, draw, make, tiles[target], names, options
            )
            row |= failures(normalize, odd) | other_organs(normalize, organs, tiles[target]) if draw == 0 else {}
        except Exception as error:
            row["cannot"] = repr(error)
        rows.append(row)
        print(f"center {target}: {method}, draw {draw} {row.get('cannot', '')}", file=sys.stderr, flush=True)
    return rows


def middle(image: Tensor) -> Tensor:
    top, left = ((size - SIDE) // 2 for size in image.shape[-2:])
    return image[:, top : top + SIDE, left : left + SIDE]


# --- Methods: each is made from the tiles of the target, and maps an image (3, H, W) in uint8 to another.


def methods(target: int, options: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[list[Tensor]], Normalize]]]:
    """(name, draw, how to make it from the target's tiles)."""
    yield "as scanned", 0, lambda tiles: lambda image: image
    name = f"camelyon17-center{target}"
    for draw, path in enumerate([name, *(folder / f"{name}.safetensors" for folder in options.seeds)]):
        yield OURS, draw, lambda tiles, path=path: NormalizeStain.pretrained(path)
        yield OFFSET, draw, lambda tiles, path=path: offset_only(NormalizeStain.pretrained(path))
    if target == 0:
        yield PAPER, 0, lambda tiles: NormalizeStain.pretrained("camelyon17-paper")
    yield CONTROL, 0, mean_match
    for name, (library, fit) in PEERS.items():
        if importlib.util.find_spec(library):
            for draw in range(options.draws):
                yield f"{name}, single", draw, lambda tiles, fit=fit, draw=draw: fit(choose(tiles, draw))
            yield f"{name}, pooled", 0, lambda tiles, fit=fit: fit(torch.cat(tiles, dim=-1))


def offset_only(normalize: NormalizeStain) -> Normalize:
    return lambda image: normalize.with_offset(normalize.estimate_offset(image))(image)


def choose(tiles: list[Tensor], draw: int) -> Tensor:
    """One tile at random; other draws give other tiles."""
    return tiles[np.random.default_rng(0).permutation(len(tiles))[draw % len(tiles)]]


# --- Figures.


def nuclei(lab: Tensor) -> Tensor:
    """Mask of the darkest tissue."""
    mask = tissue(lab)
    return mask & (lab[0] <= np.quantile(lab[0][mask], NUCLEI))


def stroma(lab: Tensor) -> Tensor:
    return tissue(lab) & (lab[0] >= STROMA[0]) & (lab[0] <= STROMA[1])


def mean_of(lab: Tensor, mask: Tensor) -> Tensor:
    """Mean (a*, b*), NaN where the mask is empty."""
    return lab[1:, mask].mean(dim=1)


def part_of(tiles: list[Tensor], part: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean (a*, b*) over images of a part of their tissue."""
    return torch.stack([mean_of(lab, part(lab)) for lab in map(lab_of, tiles)]).nanmean(dim=0)


def colors_by_lightness(lab: Tensor) -> Tensor:
    """Sums of a* and b* over the tissue, and its pixels, in bins of L*, as shares of all its pixels: (bins, 3)."""
    values = lab[:, tissue(lab)]
    of_bin = torch.bucketize(values[0], BINS[1:])
    sums = [torch.bincount(of_bin, weight, len(BINS)) for weight in (values[1], values[2], torch.ones_like(values[0]))]
    return torch.stack(sums, dim=1) / values.shape[1]


def distance_at_equal_lightness(images: list[Tensor], goal: list[Tensor]) -> float:
    """Distance of (a*, b*) between two centers in bins of L*, weighted by the tissue that both have there."""
    here, there = (torch.stack(curves).mean(dim=0) for curves in (images, goal))
    weight = torch.minimum(here[:, 2], there[:, 2])
    distance = (here[:, :2] / here[:, 2:] - there[:, :2] / there[:, 2:]).norm(dim=1)
    return float((weight * distance).nansum() / weight.sum())


def distance(colors: list[Tensor], goal: Tensor) -> float:
    return float((torch.stack(colors).nanmean(dim=0) - goal).norm())


def measure(normalize: Normalize, tiles: list[list[Tensor]], target: int) -> Figures:
    goal = torch.stack([tissue_mean(tile) for tile in tiles[target]]).mean(dim=0)
    goal_curves = [colors_by_lightness(lab_of(tile)) for tile in tiles[target]]
    parts = {"nuclei": nuclei, "stroma": stroma}
    goals = {name: part_of(tiles[target], part) for name, part in parts.items()}
    colors: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    means: dict[int, list[Tensor]] = defaultdict(list)
    curves: dict[int, list[Tensor]] = defaultdict(list)
    features, labels, intensities, clipped, glass, structure = [], [], [], [], [], []
    raised = 0
    for center, images in enumerate(tiles):
        for image in images:
            try:
                after = normalize(image)
            except Exception:
                after = image
                raised += center != target
            lab, lab_after = lab_of(image), lab_of(after)
            mask = tissue(lab)
            inside = lab_after[:, mask]
            features.append(torch.cat([inside.mean(dim=1), inside.std(dim=1)]).numpy())
            labels.append(center)
            if center == target:
                continue
            means[center].append(inside[1:].mean(dim=1))
            for name, part in parts.items():
                colors[name, center].append(mean_of(lab_after, part(lab)))
            curves[center].append(colors_by_lightness(lab_after))
            grey = after.float().mean(dim=0)[mask]
            intensities.append(float(grey.median() / grey.quantile(0.95)))
            at_limit = ((after == 0) | (after == 255)) & ~((image == 0) | (image == 255))
            clipped.append(float(at_limit.any(dim=0)[mask].float().mean()))
            bright = lab[0] > GLASS
            if bright.float().mean() >= 0.001:
                glass.append(float((lab_after - lab).norm(dim=0)[bright].mean()))
            structure.append(structural_similarity(lab[0].numpy(), lab_after[0].numpy(), data_range=100))
    by_center = torch.stack([torch.stack(center).mean(dim=0) for center in means.values()])
    spread = torch.stack([torch.stack(center).std(dim=0).norm() for center in means.values()])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    # Leaving one image of every center out at a time: with one image in all, the others of its center would be fewer.
    folds = StratifiedKFold(min(map(len, tiles)), shuffle=True, random_state=0)
    predicted = cross_val_predict(classifier, np.stack(features), np.array(labels), cv=folds)
    return {
        "distance": float((by_center - goal).norm(dim=1).mean()),
        "equal_lightness": float(
            np.mean([distance_at_equal_lightness(curve, goal_curves) for curve in curves.values()])
        ),
        **{name: float(np.mean([distance(colors[name, center], goals[name]) for center in means])) for name in parts},
        "spread": float(spread.mean()),
        "nmi": float(np.std(intensities)),
        "told_apart": float((predicted == np.array(labels)).mean()),
        "clipped": 100 * float(np.mean(clipped)),
        "glass": float(np.mean(glass)) if glass else float("nan"),
        "glass_images": len(glass),
        "ssim": float(np.mean(structure)),
        "raised": raised,
    }


def known_changes(
    method: str,
    target: int,
    draw: int,
    make: Callable[[list[Tensor]], Normalize],
    tiles: list[Tensor],
    names: list[str],
    options: argparse.Namespace,
) -> Figures:
    """How far target tiles, never used as a reference or in training, are from themselves after a known change."""
    if method == PAPER or (method in (OURS, OFFSET) and (draw or not options.folds)):
        return {}
    generator = torch.Generator().manual_seed(0)
    offsets = random_offset((CHANGES,), 30, generator)
    stains = (0.7 * 2 ** torch.rand(CHANGES, 2, generator=generator)).numpy()
    errors: dict[str, list[float]] = defaultdict(list)
    for number, (tile, name) in enumerate(zip(tiles, names, strict=True)):
        if method in (OURS, OFFSET):
            ours = NormalizeStain.pretrained(fold_without(name, target, options.folds))
            normalize = ours if method == OURS else offset_only(ours)
        else:
            normalize = make(tiles[:number] + tiles[number + 1 :])
        truth = tissue_mean(tile)
        for key, changed in (
            *(("known_offset", shift_ab(tile, offset)) for offset in offsets),
            *(("known_stain", scale_stains(tile, factors)) for factors in stains),
        ):
            errors[key].append(float((tissue_mean(normalize(changed), like=tile) - truth).abs().mean()))
    return {key: float(np.mean(values)) for key, values in errors.items()}


def fold_without(name: str, target: int, folder: Path) -> Path:
    """The network of a target that has not seen this image."""
    for path in sorted(folder.glob(f"camelyon17-center{target}.*.safetensors")):
        if Path(name).stem in left_out_of(path):
            return path
    raise FileNotFoundError(f"{folder} has no network that was trained without {name}")


def scale_stains(image: Tensor, factors: np.ndarray) -> Tensor:
    """The image with its hematoxylin and eosin scaled (Ruifrok and Johnston's stain vectors)."""
    stains = rgb2hed(image.permute(1, 2, 0).numpy())
    stains[..., :2] *= factors
    return torch.from_numpy((255 * hed2rgb(stains)).round().astype(np.uint8)).permute(2, 0, 1)


def failures(normalize: Normalize, images: dict[str, Tensor]) -> Figures:
    """How many odd images end in an exception or NaN, turn black, or, if blank or with pen, take on another color."""
    counts = {"failed": 0, "black": 0, "tinted": 0}
    for name, image in images.items():
        try:
            after = normalize(image)
        except Exception:
            counts["failed"] += 1
            continue
        counts["black"] += bool(after.float().mean() < 0.3 * image.float().mean())
        if any(word in name for word in ("almost-white", "no-tissue", "pen")):
            counts["tinted"] += bool((lab_of(after) - lab_of(image)).norm(dim=0).mean() > 10)
    return counts


def other_organs(normalize: Normalize, images: list[Tensor], tiles: list[Tensor]) -> Figures:
    """What becomes of the nuclei of other organs; images that cannot be normalized count as they are."""
    goal = part_of(tiles, nuclei)
    before, after, teal = [], [], []
    for image in images:
        lab = lab_of(image[:, ::STEP, ::STEP])
        mask = nuclei(lab)
        try:
            changed = normalize(image)[:, ::STEP, ::STEP]
        except Exception:
            changed = image[:, ::STEP, ::STEP]
        before.append(float((mean_of(lab, mask) - goal).norm()))
        after.append(float((mean_of(lab_of(changed), mask) - goal).norm()))
        red, green = changed[:2, mask].int()
        teal.append(float((green > red + 2).float().mean()))
    farther = sum(b > a for a, b in zip(before, after, strict=True))
    return {"monuseg": float(np.mean(after)), "farther": farther, "teal": 100 * float(np.mean(teal))}


# --- What is printed.


def print_table(rows: list[Figures]) -> None:
    print(f"| method | {' | '.join(COLUMNS.values())} |")
    print("|" + " --- |" * (len(COLUMNS) + 1))
    by_method: dict[str, dict[int, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "cannot" not in row and row["method"] != PAPER:
            by_method[row["method"]][row["target"]].append(row)
    for method, by_target in by_method.items():
        cells = []
        for key in COLUMNS:
            values = [[row[key] for row in group if key in row] for group in by_target.values()]
            values = [group for group in values if group]
            if not values:
                cells.append("")
                continue
            digits = 3 if key == "nmi" else 2
            means = [np.mean(group) for group in values]
            over_draws = np.mean([np.std(group, ddof=1) for group in values if len(group) > 1] or [np.nan])
            cell = f"{np.nanmean(means):.{digits}f}"
            if key not in ("raised", "failed", "black", "tinted", "farther"):
                spreads = [np.nanstd(means, ddof=1) if len(means) > 1 else np.nan, over_draws]
                cell += " (" + ", ".join("-" if np.isnan(value) else f"{value:.{digits}f}" for value in spreads) + ")"
            cells.append(cell)
        print(f"| {method} | {' | '.join(cells)} |")
    print(LEGEND)
    for row in rows:
        if "cannot" in row:
            print(f"left out: {row['method']}, draw {row['draw']}, target center {row['target']}: {row['cannot']}")


def print_by_target(rows: list[Figures], tiles: list[list[Tensor]]) -> None:
    targets = sorted({row["target"] for row in rows})
    for key, what in BY_TARGET.items():
        print(f"\n{what} by target: mean over draws or seeds, and as a share of that before.")
        print(f"| method | {' | '.join(f'center {target}' for target in targets)} |")
        print("|" + " --- |" * (len(targets) + 1))
        before = {row["target"]: row[key] for row in rows if row["method"] == "as scanned"}
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = []
            for target in targets:
                values = [row[key] for row in rows if (row["method"], row["target"]) == (method, target) and key in row]
                cells.append(f"{np.mean(values):.1f} ({np.mean(values) / before[target]:.2f})" if values else "")
            print(f"| {method} | {' | '.join(cells)} |")
    cells = []
    for target in targets:
        means = torch.stack([tissue_mean(tile) for tile in tiles[target]])
        others = (means.sum(dim=0) - means) / (len(means) - 1)
        cells.append(f"{float((means - others).norm(dim=1).mean()):.1f}, spread {float(means.std(dim=0).norm()):.1f}")
    print(f"\nOf one image of the target from its others: {'; '.join(cells)}")


def print_seams(centers: list[dict[str, Tensor]], tiles: list[list[Tensor]], options: argparse.Namespace) -> None:
    target = int(weights.load().target[-1])
    fields = [max(images.values(), key=Tensor.numel) for center, images in enumerate(centers) if center != target]
    kinds = ("most background", "most stroma", "most nuclei", "all 16")
    print(SEAMS.format(target=target))
    print(f"| method | {' | '.join(kinds)} |")
    print("|" + " --- |" * (len(kinds) + 1))
    for method, draw, make in methods(target, options):
        if draw or method in ("as scanned", PAPER) or method.endswith("single"):
            continue
        try:
            normalize = make(tiles[target])
            rows = np.array([seams(normalize, field) for field in fields])
            cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(rows.mean(0), rows.std(0, ddof=1), strict=True)]
        except Exception as error:
            cells = [repr(error)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def slides_of(folder: Path) -> dict[str, list[Tensor]]:
    """The tiles of each slide, which their names begin with."""
    slides: dict[str, list[Tensor]] = defaultdict(list)
    for path in sorted(folder.rglob("*.jpg")):
        slides[path.stem.partition("_x")[0]].append(read(path))
    return dict(slides)


def print_slides(tiles: list[list[Tensor]], data: Path) -> None:
    slides = slides_of(data / "camelyon16_slides" / "radboud")
    if not slides:
        return
    target = int(weights.load().target[-1])
    normalize = NormalizeStain.pretrained()
    print(SLIDES.format(slides=len(slides), tiles=sum(map(len, slides.values())), target=target))
    print("| method | spread | distance |\n| --- | --- | --- |")
    goal = torch.stack([tissue_mean(tile) for tile in tiles[target]]).mean(dim=0)
    by_slide = {name: normalize.for_slide(images) for name, images in slides.items()}
    changes: dict[str, Callable[[str], Normalize]] = {
        "as scanned": lambda name: lambda image: image,
        OURS: by_slide.__getitem__,
        OFFSET: lambda name: normalize.with_offset(by_slide[name].estimate_offset(mosaic(slides[name]))),
    }
    for method, make in changes.items():
        means = torch.stack(
            [
                torch.stack([tissue_mean(make(name)(image), like=image) for image in images]).nanmean(dim=0)
                for name, images in slides.items()
            ]
        )
        print(f"| {method} | {float(means.std(dim=0).norm()):.2f} | {float((means.mean(dim=0) - goal).norm()):.2f} |")


def mosaic(images: list[Tensor]) -> Tensor:
    """Tiles of one size side by side, in about a square."""
    columns = round(len(images) ** 0.5)
    rows = [torch.cat(images[at : at + columns], dim=-1) for at in range(0, len(images) - columns + 1, columns)]
    return torch.cat(rows, dim=-2)


def print_skin(data: Path) -> None:
    """Needs the extra ``slides``."""
    path = data / "slides" / "small_HE.svs"
    if not path.exists() or importlib.util.find_spec("openslide") is None:
        return
    from stainnorm_transform.slides import Slide, slide_normalizer

    normalize = NormalizeStain.pretrained()
    with Slide(path) as slide:
        fixed = slide_normalizer(slide, normalize).normalize
        whole = slide.read(0, 0, *slide.dimensions)
    offset = normalize.with_offset(fixed.estimate_offset(whole))
    pairs = ((normalize, fixed), (offset_only(normalize), offset))
    of_map, of_offset = (
        [difference for _, difference in against_whole(alone, whole, together(whole), 256)] for alone, together in pairs
    )
    figures = {"mean": np.mean(of_map), "most": max(of_map)}
    figures |= {"mean_offset": np.mean(of_offset), "most_offset": max(of_offset)}
    print(SKIN.format(target=int(weights.load().target[-1]), tiles=len(of_map), **figures))


def seams(normalize: Normalize, field: Tensor) -> tuple[float, float, float, float]:
    """dE76 for the tiles with the most background, stroma and nuclei that have 2 % tissue, and the mean of all."""
    shares, differences = [], []
    for lightness, difference in against_whole(normalize, field, normalize(field), SIDE):
        differences.append(difference)
        kinds = (lightness > TISSUE[1], (lightness > STROMA[0]) & (lightness < STROMA[1]), lightness < 45)
        shares.append([float(kind.float().mean()) for kind in kinds])
    most_background, most_stroma, most_nuclei = (differences[number] for number in np.argmax(shares, axis=0))
    return most_background, most_stroma, most_nuclei, float(np.mean(differences))


def against_whole(normalize: Normalize, field: Tensor, whole: Tensor, side: int) -> Iterator[tuple[Tensor, float]]:
    """Of each tile of a field with 2 % tissue its L*, and the dE76 between it alone and within the normalized whole."""
    for top in range(0, field.shape[1] - side + 1, side):
        for left in range(0, field.shape[2] - side + 1, side):
            window = (slice(None), slice(top, top + side), slice(left, left + side))
            lab = lab_of(field[window])
            mask = tissue(lab)
            if mask.float().mean() < 0.02:
                continue
            alone, within = lab_of(normalize(field[window])), lab_of(whole[window])
            yield lab[0], float((alone - within).norm(dim=0)[mask].mean())


def plot(tiles: list[list[Tensor]], path: Path) -> None:
    import matplotlib.pyplot as plt

    target = int(weights.load().target[-1])
    normalize = NormalizeStain.pretrained()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    for axis, title, change in zip(axes, ("as scanned", "normalized"), (lambda image: image, normalize), strict=True):
        for center, images in enumerate(tiles):
            means = torch.stack([tissue_mean(change(image), like=image) for image in images])
            label, marker = (f"center {center}, the target", "*") if center == target else (f"center {center}", "o")
            axis.scatter(
                *means.T,
                label=label,
                marker=marker,
                s=90 if center == target else 40,
                alpha=0.8,
                zorder=3 if center == target else 2,
            )
        axis.set_title(title)
        axis.set_xlabel("a* (green to red)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("b* (blue to yellow)")
    axes[1].legend(loc="lower left")
    figure.suptitle("Mean color of the tissue, one point an image")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
