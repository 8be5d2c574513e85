"""Measures weights on CAMELYON17: how far the colors of the five centers are apart before and after, and white glass.

python examples/measure_camelyon17.py --weights camelyon17
"""

import argparse

import numpy as np
import torch
from camelyon17 import CENTERS, add_data_option, read_center
from kornia.color import rgb_to_lab
from torch import Tensor

from stainnorm_transform import NormalizeStain, weights

TISSUE = (10, 88)  # L*
PALE = (80, 88)  # L*
WHITE = 97  # L*


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--weights", default=weights.DEFAULT, help="name or path (default: %(default)s)")
    options = parser.parse_args()

    normalize = NormalizeStain.pretrained(options.weights)
    print(normalize)
    before, after, pale, moved, batches = [], [], [], [], []
    for center in CENTERS:
        images = list(read_center(options.data, center).values())
        normalized = [normalize(image) for image in images]
        for image, result in zip(images, normalized, strict=True):
            lab, lab_after = rgb_to_lab(image / 255), rgb_to_lab(result / 255)
            tissue = (lab[0] > TISSUE[0]) & (lab[0] < TISSUE[1])
            before.append(lab[1:, tissue].mean(dim=1))
            after.append(lab_after[1:, tissue].mean(dim=1))
            is_pale = (lab[0] > PALE[0]) & (lab[0] < PALE[1])
            pale.append(torch.stack([values[1:, is_pale].mean(dim=1) for values in (lab, lab_after)]))
            moved.append((lab_after - lab).norm(dim=0)[lab[0] > WHITE])
        tiles = torch.stack([image[:, :512, :512] for image in images])
        batches.append(torch.equal(normalize(tiles), torch.stack([normalize(tile) for tile in tiles])))

    print(f"\n{'tissue (a*, b*)':15}{'before':>16}{'after':>16}{'spread before':>16}{'after':>10}   n = 6 images each")
    for center in CENTERS:
        rows = [torch.stack(values)[6 * center : 6 * center + 6] for values in (before, after)]
        means = ["({:.1f}, {:.1f})".format(*values.mean(dim=0).tolist()) for values in rows]
        spreads = [f"{values.std(dim=0).norm():.1f}" for values in rows]
        print(f"center {center:<8}{means[0]:>16}{means[1]:>16}{spreads[0]:>16}{spreads[1]:>10}")
    for center in CENTERS:
        means = torch.stack(pale)[6 * center : 6 * center + 6].nanmean(dim=0).tolist()
        before_after = " to ".join("({:.1f}, {:.1f})".format(*mean) for mean in means)
        print(f"center {center}, pale tissue (L* {PALE[0]} to {PALE[1]}): {before_after}")
    near, far = between_centers(after), between_centers(before)
    print(f"mean distance between centers: before {far:.2f}, after {near:.2f}, ratio {near / far:.3f}")

    white = torch.cat(moved)
    print(
        f"white pixels (L* > {WHITE}): n = {len(white)}, moved by dE76 mean {white.mean():.2f}, "
        f"99th percentile {np.percentile(white, 99):.2f}, max {white.max():.2f}"
    )
    print(f"uint8 batches equal to their images one by one, bit for bit: {sum(batches)} of {len(batches)}")


def between_centers(means: list[Tensor]) -> float:
    """Mean distance over pairs of centers, each the mean of its images' (a*, b*)."""
    centers = torch.stack(means).reshape(len(CENTERS), -1, 2).mean(dim=1)
    return float(torch.pdist(centers).mean())


if __name__ == "__main__":
    main()
