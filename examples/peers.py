"""Other methods of stain normalization, and a control without a network, for the examples that compare with them.

Each is made from a reference, and maps an image (3, H, W) in uint8 to another. They raise where they cannot.
"""

from collections.abc import Callable

import numpy as np
import torch
from kornia.color import rgb_to_lab
from torch import Tensor

from stainnorm_transform.color import fade, shift_ab

TISSUE = (10, 88)  # L*
Normalize = Callable[[Tensor], Tensor]


def lab_of(image: Tensor) -> Tensor:
    return rgb_to_lab(image.float() / 255)


def tissue(lab: Tensor) -> Tensor:
    return (lab[0] > TISSUE[0]) & (lab[0] < TISSUE[1])


def tissue_mean(image: Tensor, like: Tensor | None = None) -> Tensor:
    """Mean (a*, b*) over the tissue, which is that of ``like`` if given."""
    lab = lab_of(image)
    return lab[1:, tissue(lab if like is None else lab_of(like))].mean(dim=1)


def mean_match(tiles: list[Tensor]) -> Normalize:
    goal = torch.stack([tissue_mean(tile) for tile in tiles]).nanmean(dim=0)

    def normalize(image: Tensor) -> Tensor:
        lab = lab_of(image)
        share = fade(lab[0])[tissue(lab)].mean()
        return shift_ab(image, ((goal - tissue_mean(image)) / share).nan_to_num())

    return normalize


def tiatoolbox(name: str) -> Callable[[Tensor], Normalize]:
    def fit(reference: Tensor) -> Normalize:
        from tiatoolbox.tools.stainnorm import get_normalizer

        normalizer = get_normalizer(name)
        normalizer.fit(to_array(reference))

        def normalize(image: Tensor) -> Tensor:
            # It casts to uint8, which would hide NaN.
            with np.errstate(invalid="raise"):
                return torch.from_numpy(normalizer.transform(to_array(image))).permute(2, 0, 1)

        return normalize

    return fit


def torchstain_macenko(reference: Tensor) -> Normalize:
    import torchstain

    normalizer = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    normalizer.fit(reference.float())

    def normalize(image: Tensor) -> Tensor:
        after = normalizer.normalize(image.float(), stains=False)[0]
        if after.min() < 0:  # NaN as an integer
            raise FloatingPointError("NaN")
        return after.clamp(0, 255).to(torch.uint8).permute(2, 0, 1)

    return normalize


def torchstain_reinhard(reference: Tensor) -> Normalize:
    import torchstain

    normalizer = torchstain.normalizers.ReinhardNormalizer(backend="torch")
    normalizer.fit(reference.float())
    # It overwrites what it is given.
    return lambda image: normalizer.normalize(image.float()).permute(2, 0, 1).to(torch.uint8)


PEERS = {
    "Reinhard (tiatoolbox)": ("tiatoolbox", tiatoolbox("reinhard")),
    "Macenko (tiatoolbox)": ("tiatoolbox", tiatoolbox("macenko")),
    "Macenko (torchstain)": ("torchstain", torchstain_macenko),
    "Vahadane (tiatoolbox)": ("tiatoolbox", tiatoolbox("vahadane")),
}


def to_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy().copy()
