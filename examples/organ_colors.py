"""Measures what each target makes of the colors of other organs, on the 30 images of MoNuSeg.

pip install -e ".[evidence]" && python examples/organ_colors.py

No network is trained here, and those of the targets have seen lymph nodes only. Nuclei are those of the instance maps;
other tissue is the rest of the tissue.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
from camelyon17 import CENTERS, add_data_option
from monuseg import FOLDERS, Sample, read_monuseg
from nuclei_tables import print_table
from peers import lab_of, tissue
from torch import Tensor
from tqdm import tqdm

from stainnorm_transform import NormalizeStain

STEP = 2  # every so many pixels are measured
RED, GREENISH = 5, 2  # b* from which tissue counts as red; levels by which G exceeds R
FEWEST = 6  # images with the fewest nuclei
LEGEND = """
Spread: root mean square distance of the images' mean (a*, b*) of the tissue from the mean of their organ, or of all."""
TARGETS_LEGEND = f"""
Mean over all images, ± standard deviation. dE: mean dE76 over the tissue. Contrast: distance of the mean (a*, b*) of
nuclei from that of other tissue, in an image. Red: share of other tissue with b* > {RED}, as erythrocytes and muscle
have. Greenish: share of the pixels of nuclei with G > R + {GREENISH}."""
FEWEST_LEGEND = """
Mean (a*, b*) of other tissue in the images with the fewest nuclei (share of their pixels)."""


class Colors(NamedTuple):
    """Of one image: mean (a*, b*) of the tissue, and of the tissue that is no nucleus; figures as in the legend."""

    tissue: np.ndarray
    other: np.ndarray
    change: float
    contrast: float
    red: float
    greenish: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, needed=FOLDERS)
    options = parser.parse_args()
    try:
        samples = read_monuseg(options.data / "monuseg", crop=1)
    except ValueError as error:
        parser.error(str(error))
    targets = {f"center {center}": NormalizeStain.pretrained(f"camelyon17-center{center}") for center in CENTERS}
    colors: dict[str, list[Colors]] = {name: [] for name in ("as scanned", *targets)}
    for sample in tqdm(samples, unit="image", disable=None):
        colors["as scanned"].append(colors_of(sample, sample.image))
        for name, normalize in targets.items():
            colors[name].append(colors_of(sample, normalize(sample.image)))
    print_spread(samples, colors)
    print_targets(colors)
    print_fewest(samples, colors)


def colors_of(sample: Sample, after: Tensor) -> Colors:
    """Of an image after a change, with tissue where it was before."""
    raw, after = (image[:, ::STEP, ::STEP] for image in (sample.image, after))
    before, lab = lab_of(raw), lab_of(after)
    everywhere = tissue(before)
    nuclei = (sample.instances[::STEP, ::STEP] > 0) & everywhere
    other = everywhere & ~nuclei
    of_nuclei, of_other = (lab[1:, mask].mean(dim=1) for mask in (nuclei, other))
    red, green = after[:2, nuclei].int()
    return Colors(
        tissue=lab[1:, everywhere].mean(dim=1).numpy(),
        other=of_other.numpy(),
        change=float((lab - before).norm(dim=0)[everywhere].mean()),
        contrast=float((of_nuclei - of_other).norm()),
        red=float((lab[2, other] > RED).float().mean()),
        greenish=float((green > red + GREENISH).float().mean()),
    )


def spread(colors: list[Colors]) -> float:
    means = np.stack([each.tissue for each in colors])
    return float(np.sqrt(((means - means.mean(axis=0)) ** 2).sum(axis=1).mean()))


def print_spread(samples: list[Sample], colors: dict[str, list[Colors]]) -> None:
    rows = []
    for organ in [*sorted({sample.organ for sample in samples}), None]:
        chosen = [number for number, sample in enumerate(samples) if organ in (sample.organ, None)]
        sites = len({samples[number].site for number in chosen})
        cells = [f"{spread([of[number] for number in chosen]):.1f}" for of in colors.values()]
        rows.append([organ or "all", f"{len(chosen)}, {sites}", *cells])
    print(LEGEND)
    print_table(["organ", "images, sites", *colors], rows)


def print_targets(colors: dict[str, list[Colors]]) -> None:
    def cell(of: list[Colors], name: str, unit: float = 1) -> str:
        values = [unit * getattr(each, name) for each in of]
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"

    print(TARGETS_LEGEND)
    print_table(
        ["target", "dE", "contrast", "red, %", "greenish, %"],
        (
            [name, cell(of, "change"), cell(of, "contrast"), cell(of, "red", 100), cell(of, "greenish", 100)]
            for name, of in colors.items()
        ),
    )


def print_fewest(samples: list[Sample], colors: dict[str, list[Colors]]) -> None:
    shares = [float((sample.instances > 0).float().mean()) for sample in samples]
    rows = []
    for number in np.argsort(shares)[:FEWEST]:
        cells = [", ".join(f"{value:.0f}" for value in of[number].other) for of in colors.values()]
        rows.append([samples[number].name, samples[number].organ, f"{100 * shares[number]:.0f} %", *cells])
    print(FEWEST_LEGEND)
    print_table(["image", "organ", "nuclei", *colors], rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
