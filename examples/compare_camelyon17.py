"""Compares ColorNormNet with Reinhard, Macenko, Vahadane and a control without a network on CAMELYON17.

pip install -e ".[compare]" && python examples/compare_camelyon17.py --plot centers.png

For each target center, the images of the other four are normalized. The peers take single reference tiles, drawn at
random from the target, or a mosaic of all its images (pooled). The control matches the mean a*, b* of an image's tissue
to that of the target's images, white preserved.
"""

import argparse
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
from camelyon17 import CENTERS, add_data_option, read, read_center
from kornia.color import rgb_to_lab
from skimage.metrics import structural_similarity
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from stainnorm_transform import NormalizeStain, weights
from stainnorm_transform.color import random_offset, shift_ab

SIDE = 512  # of the tiles compared; of a large field, the middle
TISSUE, WHITE = (10, 88), 97  # L*
BINS = torch.arange(TISSUE[0], TISSUE[1], 6.0)  # L*
SHIFTS = 4  # known offsets for each target tile
OURS, CONTROL = "ColorNormNet", "mean match (control)"
Normalize = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--draws", type=int, default=3, help="single reference tiles (default: %(default)s)")
    parser.add_argument("--targets", type=int, nargs="+", default=list(CENTERS), help="centers (default: all)")
    parser.add_argument(
        "--seeds", type=Path, nargs="*", default=[], help="folders with NAME.safetensors trained with other seeds"
    )
    parser.add_argument("--processes", type=int, default=2, help="one core each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--plot", type=Path, help="PNG file for the tissue colors before and after")
    options = parser.parse_args()
    quiet()
    centers = [read_center(options.data, center) for center in CENTERS]
    tiles = [[middle(image) for image in images.values()] for images in centers]
    # One target to a core.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, initializer=quiet) as pool:
        jobs = [pool.submit(compare, target, tiles, options) for target in options.targets]
        rows = [row for job in tqdm(jobs, unit="target", disable=None) for row in job.result()]
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for method, figures in rows:
        results[method].append(figures)
    print_table(results)
    print_distances(results, options.targets)
    print_seams(centers, tiles, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(tiles, options.plot)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)


def compare(target: int, tiles: list[list[Tensor]], options: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    """(method, figures) for every method and draw."""
    odd = [read(path) for path in sorted((options.data / "edge_cases").iterdir()) if path.suffix in (".png", ".jpg")]
    rows = []
    for method, draw, make in methods(target, options):
        normalize = make(tiles[target])
        figures = {"target": target, "draw": draw, **measure(unchanged_if_it_raises(normalize), tiles, target)}
        figures["error"] = known_offset_error(make, tiles[target], target, method)
        if draw == 0:
            figures |= failures(normalize, odd)
        rows.append((method, figures))
        print(f"center {target}: {method}, draw {draw}", file=sys.stderr, flush=True)
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
    if target == 0:
        yield "ColorNormNet, paper's recipe", 0, lambda tiles: NormalizeStain.pretrained("camelyon17-paper")
    yield CONTROL, 0, mean_match
    for name, fit in PEERS.items():
        for draw in range(options.draws):
            yield f"{name}, single", draw, lambda tiles, fit=fit, draw=draw: fit(choose(tiles, draw))
        yield f"{name}, pooled", 0, lambda tiles, fit=fit: fit(mosaic(tiles))


def choose(tiles: list[Tensor], draw: int) -> Tensor:
    """One tile at random; other draws give other tiles."""
    return tiles[np.random.default_rng(0).permutation(len(tiles))[draw % len(tiles)]]


def mosaic(tiles: list[Tensor]) -> Tensor:
    return torch.cat(tiles, dim=-1)


def mean_match(tiles: list[Tensor]) -> Normalize:
    goal = torch.stack([tissue_mean(tile) for tile in tiles]).nanmean(dim=0)

    def normalize(image: Tensor) -> Tensor:
        return shift_ab(image, (goal - tissue_mean(image)).nan_to_num())

    return normalize


def tiatoolbox(name: str) -> Callable[[Tensor], Normalize]:
    def fit(reference: Tensor) -> Normalize:
        from tiatoolbox.tools.stainnorm import get_normalizer

        normalizer = get_normalizer(name)
        normalizer.fit(to_array(reference))
        return lambda image: to_image(normalizer.transform(to_array(image)))

    return fit


def torchstain_macenko(reference: Tensor) -> Normalize:
    import torchstain

    normalizer = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    normalizer.fit(reference.float())
    return lambda image: to_image(normalizer.normalize(image.float(), stains=False)[0].numpy())


PEERS = {
    "Reinhard (tiatoolbox)": tiatoolbox("reinhard"),
    "Macenko (tiatoolbox)": tiatoolbox("macenko"),
    "Macenko (torchstain)": torchstain_macenko,
    "Vahadane (tiatoolbox)": tiatoolbox("vahadane"),
}


def to_array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()).copy()


def to_image(array: np.ndarray) -> Tensor:
    if not np.isfinite(array).all():
        raise FloatingPointError("NaN or infinity")
    return torch.from_numpy(np.clip(np.round(array), 0, 255).astype(np.uint8)).permute(2, 0, 1)


# --- Figures.


def lab_of(image: Tensor) -> Tensor:
    return rgb_to_lab(image.float() / 255)


def tissue(lab: Tensor) -> Tensor:
    return (lab[0] > TISSUE[0]) & (lab[0] < TISSUE[1])


def tissue_mean(image: Tensor, like: Tensor | None = None) -> Tensor:
    """Mean (a*, b*) over the tissue, which is that of ``like`` if given."""
    lab = lab_of(image)
    return lab[1:, tissue(lab if like is None else lab_of(like))].mean(dim=1)


def colors_by_lightness(lab: Tensor) -> Tensor:
    """Mean (a*, b*) of the tissue, and its share, in bins of L*: (bins, 3)."""
    values = lab[:, tissue(lab)]
    of_bin = torch.bucketize(values[0], BINS[1:])
    sums = torch.stack([torch.bincount(of_bin, weight, len(BINS)) for weight in (values[1], values[2])], dim=1)
    counts = torch.bincount(of_bin, minlength=len(BINS))[:, None]
    return torch.cat([sums / counts, counts / counts.sum()], dim=1)


def distance_at_equal_lightness(images: list[Tensor], goal: list[Tensor]) -> float:
    """Distance of (a*, b*) between two centers in bins of L*, weighted by the tissue that both have there."""
    here, there = (torch.stack(curves).nanmean(dim=0) for curves in (images, goal))
    weight = torch.minimum(here[:, 2], there[:, 2])
    distance = (here[:, :2] - there[:, :2]).norm(dim=1)
    return float((weight * distance).nansum() / weight.sum())


def unchanged_if_it_raises(normalize: Normalize) -> Normalize:
    """So that one image that a method cannot do does not end the comparison."""

    def attempt(image: Tensor) -> Tensor:
        try:
            return normalize(image)
        except Exception as error:
            print(f"left as it is: {error!r}", file=sys.stderr)
            return image

    return attempt


def measure(normalize: Normalize, tiles: list[list[Tensor]], target: int) -> dict[str, float]:
    goal = torch.stack([tissue_mean(tile) for tile in tiles[target]]).mean(dim=0)
    goal_curves = [colors_by_lightness(lab_of(tile)) for tile in tiles[target]]
    means: dict[int, list[Tensor]] = defaultdict(list)
    curves: dict[int, list[Tensor]] = defaultdict(list)
    features, labels, intensities, clipped, white, structure = [], [], [], [], [], []
    for center, images in enumerate(tiles):
        for image in images:
            after = normalize(image)
            lab, lab_after = lab_of(image), lab_of(after)
            mask = tissue(lab)
            inside = lab_after[:, mask]
            features.append(torch.cat([inside.mean(dim=1), inside.std(dim=1)]).numpy())
            labels.append(center)
            if center == target:
                continue
            means[center].append(inside[1:].mean(dim=1))
            curves[center].append(colors_by_lightness(lab_after))
            grey = after.float().mean(dim=0)[mask]
            intensities.append(float(grey.median() / grey.quantile(0.95)))
            at_limit = ((after == 0) | (after == 255)) & ~((image == 0) | (image == 255))
            clipped.append(float(at_limit.any(dim=0).float().mean()))
            white.append((lab_after - lab).norm(dim=0)[lab[0] > WHITE])
            structure.append(structural_similarity(lab[0].numpy(), lab_after[0].numpy(), data_range=100))
    by_image = torch.stack([mean for center in means.values() for mean in center])
    by_center = torch.stack([torch.stack(center).mean(dim=0) for center in means.values()])
    spread = torch.stack([torch.stack(center).std(dim=0).norm() for center in means.values()])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    predicted = cross_val_predict(classifier, np.stack(features), np.array(labels), cv=LeaveOneOut())
    return {
        "distance": float((by_center - goal).norm(dim=1).mean()),
        "distance_by_image": float((by_image - goal).norm(dim=1).mean()),
        "equal_lightness": float(
            np.mean([distance_at_equal_lightness(values, goal_curves) for values in curves.values()])
        ),
        "spread": float(spread.mean()),
        "nmi_std": float(np.std(intensities)),
        "told_apart": float((predicted == np.array(labels)).mean()),
        "clipped": float(np.mean(clipped)),
        "white": float(torch.cat(white).mean()),
        "ssim": float(np.mean(structure)),
    }


def known_offset_error(
    make: Callable[[list[Tensor]], Normalize], tiles: list[Tensor], target: int, method: str
) -> float:
    """How far target tiles, never used as a reference or in training, are from themselves after a known shift."""
    if method.startswith(OURS):
        name = "camelyon17-paper" if "paper" in method else f"camelyon17-center{target}"
        return float(np.mean(list(weights.load(name).metrics["held_out_error"].values())))
    offsets = random_offset((SHIFTS,), 30, torch.Generator().manual_seed(0))
    errors = []
    for number, tile in enumerate(tiles):
        normalize = unchanged_if_it_raises(make(tiles[:number] + tiles[number + 1 :]))
        before = tissue_mean(tile)
        for offset in offsets:
            errors.append((tissue_mean(normalize(shift_ab(tile, offset)), like=tile) - before).abs().mean())
    return float(torch.stack(errors).mean())


def failures(normalize: Normalize, images: list[Tensor]) -> dict[str, float]:
    """How many odd images end in an exception or NaN, or turn black."""
    failed = black = 0
    for image in images:
        try:
            after = normalize(image)
        except Exception:
            failed += 1
        else:
            black += bool(after.float().mean() < 0.3 * image.float().mean())
    return {"exceptions": failed, "black": black, "odd_images": len(images)}


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    columns = {
        "distance": "distance",
        "equal_lightness": "at equal L*",
        "spread": "spread",
        "nmi_std": "NMI sd",
        "told_apart": "told apart",
        "error": "known offset",
        "clipped": "clipped %",
        "white": "white dE",
        "ssim": "SSIM L*",
    }
    print("Mean and standard deviation over targets and draws or seeds; n = 24 images of 4 centers for each.")
    print(f"| method | {' | '.join(columns.values())} | failed, black |")
    print("|" + " --- |" * (len(columns) + 2))
    for method, rows in results.items():
        cells = []
        for key in columns:
            values = np.array([row[key] for row in rows]) * (100 if key in ("clipped",) else 1)
            cells.append(f"{values.mean():.2f} ± {values.std():.2f}")
        odd = [row for row in rows if "exceptions" in row]
        cells.append(
            f"{np.mean([row['exceptions'] for row in odd]):.1f}, {np.mean([row['black'] for row in odd]):.1f} "
            f"of {odd[0]['odd_images']}"
        )
        print(f"| {method} | {' | '.join(cells)} |")


def print_distances(results: dict[str, list[dict[str, float]]], targets: list[int]) -> None:
    print("\nDistance by target: mean over draws or seeds, and as a share of that before.")
    print(f"| method | {' | '.join(f'center {target}' for target in targets)} |")
    print("|" + " --- |" * (len(targets) + 1))
    before = {row["target"]: row["distance"] for row in results["as scanned"]}
    for method, rows in results.items():
        cells = []
        for target in targets:
            values = [row["distance"] for row in rows if row["target"] == target]
            cells.append(f"{np.mean(values):.1f} ({np.mean(values) / before[target]:.2f})" if values else "")
        print(f"| {method} | {' | '.join(cells)} |")


def print_seams(centers: list[dict[str, Tensor]], tiles: list[list[Tensor]], options: argparse.Namespace) -> None:
    """Tiles of one slide, normalized alone, against the same tiles cut from the normalized field."""
    target = int(weights.load().target[-1])
    kinds = ("most background", "most stroma", "most nuclei", "all 16")
    print(
        f"\nTiles of one slide, target center {target}: mean dE76 over the tissue between a tile normalized alone and"
    )
    print("the same tile within its normalized field; mean and standard deviation over the 4 fields of other centers.")
    print(f"| method | {' | '.join(kinds)} |")
    print("|" + " --- |" * (len(kinds) + 1))
    fields = [max(images.values(), key=Tensor.numel) for center, images in enumerate(centers) if center != target]
    for method, draw, make in methods(target, options):
        if draw or method == "as scanned" or method.endswith("single"):
            continue
        normalize = make(tiles[target])
        rows = np.array([seams(normalize, field) for field in fields])
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(rows.mean(axis=0), rows.std(axis=0), strict=True)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def seams(normalize: Normalize, field: Tensor) -> tuple[float, float, float, float]:
    whole = normalize(field)
    corners = [(top, left) for top in range(0, 2048, SIDE) for left in range(0, 2048, SIDE)]
    lightness, differences = [], []
    for top, left in corners:
        window = (slice(None), slice(top, top + SIDE), slice(left, left + SIDE))
        lab = lab_of(field[window])
        mask = tissue(lab)
        alone, within = lab_of(normalize(field[window])), lab_of(whole[window])
        differences.append(float((alone - within).norm(dim=0)[mask].mean()))
        lightness.append(lab[0])
    background = [float((values > TISSUE[1]).float().mean()) for values in lightness]
    stroma = [float(((values > 60) & (values < 80)).float().mean()) for values in lightness]
    nuclei = [float((values < 45).float().mean()) for values in lightness]
    chosen = [differences[int(np.argmax(shares))] for shares in (background, stroma, nuclei)]
    return chosen[0], chosen[1], chosen[2], float(np.mean(differences))


def plot(tiles: list[list[Tensor]], path: Path) -> None:
    import matplotlib.pyplot as plt

    loaded = weights.load()
    normalize = NormalizeStain.pretrained()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    for axis, title, change in zip(axes, ("as scanned", "normalized"), (lambda image: image, normalize), strict=True):
        for center, images in enumerate(tiles):
            means = torch.stack([tissue_mean(change(image), like=image) for image in images])
            is_target = str(center) == loaded.target[-1]
            axis.scatter(
                *means.T,
                label=f"center {center}{' (target)' if is_target else ''}",
                marker="s" if is_target else "o",
                alpha=0.8,
            )
        axis.set_title(title)
        axis.set_xlabel("a* of the tissue")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("b* of the tissue")
    axes[1].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
