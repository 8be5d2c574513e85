"""Networks that find nuclei: a small U-Net for a CPU, and HoVerNet for a GPU, both MONAI's.

Each says how nuclei become its targets, its loss, what it predicts for an image of any size, and how a prediction
becomes an instance map. A prediction (C, H, W) begins with the probability of a nucleus.
"""

import numpy as np
import torch
import torch.nn.functional as F
from monai.apps.pathology.losses import HoVerNetLoss
from monai.apps.pathology.transforms.post.array import (
    GenerateDistanceMap,
    GenerateInstanceBorder,
    GenerateWatershedMarkers,
    GenerateWatershedMask,
    Watershed,
)
from monai.losses import DiceCELoss
from monai.networks.nets import HoVerNet, UNet
from monai.transforms import ComputeHoVerMaps
from skimage.measure import label
from skimage.segmentation import watershed
from torch import Tensor, nn
from tqdm import tqdm

from stainnorm_transform import PerturbStain

MEAN, DEVIATION = 0.6, 0.25  # about those of H&E, of all channels, so that color stays
CORE = 5  # a pixel is in the core of a nucleus if all around it, so many pixels wide, are of that nucleus
SMALLEST = 30  # pixels of a nucleus at 40x


class SmallUNet(nn.Module):
    """A U-Net of 0.5 million parameters that tells background, rim and core of nuclei."""

    crop, learning_rate = 128, 4e-3

    def __init__(self) -> None:
        super().__init__()
        self.network = UNet(2, 3, 3, channels=(16, 32, 64, 128, 160), strides=(2, 2, 2, 2), norm="batch")
        self.criterion = DiceCELoss(softmax=True, to_onehot_y=True)

    @staticmethod
    def targets(instances: Tensor) -> Tensor:
        """Of an instance map (H, W): 0 background, 1 rim, 2 core; (1, H, W)."""
        numbers = instances[None].float()
        highest, lowest = (sign * F.max_pool2d(sign * numbers, CORE, 1, CORE // 2) for sign in (1, -1))
        nucleus = numbers > 0
        return nucleus.to(torch.uint8) + (nucleus & (highest == lowest))

    @staticmethod
    def flip(targets: Tensor, axes: tuple[int, ...]) -> Tensor:
        return targets.flip(axes)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Of images (B, 3, H, W) in [0, 1]."""
        return self.criterion(self.network((images - MEAN) / DEVIATION), targets)

    def predict(self, image: Tensor) -> Tensor:
        """Probabilities of nucleus and core, (2, H, W), for an image (3, H, W) in [0, 1]."""
        height, width = image.shape[1:]
        padded = F.pad(image[None], (0, -width % 16, 0, -height % 16), mode="reflect")
        shares = self.network((padded - MEAN) / DEVIATION)[0, :, :height, :width].softmax(dim=0)
        return torch.stack([1 - shares[0], shares[2]])

    @staticmethod
    def separate(prediction: Tensor, threshold: float) -> np.ndarray:
        """The instance map (H, W) of a prediction: cores grow by a watershed to where nuclei end."""
        nucleus, core = prediction.cpu().numpy()
        cores = label((core > 0.5) & (nucleus > threshold))
        instances = watershed(-nucleus, cores, mask=nucleus > threshold)
        return np.where(np.bincount(instances.ravel())[instances] < SMALLEST, 0, instances)


class HoVer(nn.Module):
    """HoVerNet (Graham et al. 2019, doi 10.1016/j.media.2019.101563), in the fast mode, trained from scratch.

    Of a crop of 256 pixels it sees the middle 164: nucleus or not, and how far to the left or right of, and above or
    below, the center of its nucleus each pixel is.
    """

    crop, learning_rate = 256, 1e-3
    seen, margin, at_once = 164, 46, 49

    def __init__(self) -> None:
        super().__init__()
        self.network = HoVerNet(mode="fast", in_channels=3, out_classes=0).to(memory_format=torch.channels_last)
        self.criterion = HoVerNetLoss()

    @staticmethod
    def targets(instances: Tensor) -> Tensor:
        """Of an instance map (H, W): nucleus, horizontal and vertical place in it from -1 to 1; (3, H, W)."""
        places = ComputeHoVerMaps()(instances[None].cpu().numpy()).as_tensor().to(instances.device)
        return torch.cat([(instances > 0)[None].float(), places])

    @staticmethod
    def flip(targets: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Flips also the places, left and right for axis -1, above and below for -2."""
        signs = [1.0, -1.0 if -1 in axes else 1.0, -1.0 if -2 in axes else 1.0]
        return targets.flip(axes) * torch.tensor(signs, device=targets.device).view(3, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The branches of HoVerNet, in float32, for crops (B, 3, 256, 256) in [0, 1]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            branches = self.network(((images - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last))
        return {name: branch.float() for name, branch in branches.items()}

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        middle = slice(self.margin, self.margin + self.seen)
        targets = targets[:, :, middle, middle]
        nucleus = targets[:, :1]
        truth = {"nucleus_prediction": torch.cat([1 - nucleus, nucleus], 1), "horizontal_vertical": targets[:, 1:]}
        return self.criterion(self(images), truth)

    def predict(self, image: Tensor) -> Tensor:
        """Probability of a nucleus and places, (3, H, W), for an image (3, H, W) in [0, 1], from crops side by side."""
        height, width = image.shape[1:]
        down, across = -(-height // self.seen), -(-width // self.seen)
        # Reflected at its borders; beyond what can be reflected, the border itself.
        more = self.margin, self.margin, self.margin, self.margin
        padded = F.pad(image[None], more, mode="reflect")
        padded = F.pad(padded, (0, across * self.seen - width, 0, down * self.seen - height), mode="replicate")[0]
        crops = padded.unfold(1, self.crop, self.seen).unfold(2, self.crop, self.seen)
        crops = crops.permute(1, 2, 0, 3, 4).reshape(-1, 3, self.crop, self.crop)
        parts = []
        for some in crops.split(self.at_once):
            branches = self(some)
            nucleus = branches["nucleus_prediction"].softmax(dim=1)[:, 1:]
            parts.append(torch.cat([nucleus, branches["horizontal_vertical"]], dim=1))
        whole = torch.cat(parts).view(down, across, 3, self.seen, self.seen).permute(2, 0, 3, 1, 4)
        return whole.reshape(3, down * self.seen, across * self.seen)[:, :height, :width]

    @staticmethod
    def separate(prediction: Tensor, threshold: float) -> np.ndarray:
        """The instance map (H, W), by the steps of MONAI's HoVerNetInstanceMapPostProcessing; it finds no contours."""
        nucleus, places = np.split(prediction.cpu().numpy(), [1])
        mask = GenerateWatershedMask(activation=_same, threshold=threshold, min_object_size=SMALLEST)(nucleus)
        if not mask.any():
            return np.zeros(mask.shape[1:], np.int64)
        borders = GenerateInstanceBorder(kernel_size=21)(mask, places)
        markers = GenerateWatershedMarkers(min_object_size=10)(mask, borders)
        return np.asarray(Watershed()(GenerateDistanceMap()(mask, borders), mask, markers))[0]


def _same(prediction: np.ndarray) -> np.ndarray:
    return prediction


Model = SmallUNet | HoVer
MODELS: dict[str, type[Model]] = {"unet": SmallUNet, "hovernet": HoVer}


def fit(
    model: Model,
    images: list[Tensor],
    targets: list[Tensor],
    perturb: PerturbStain | None,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Trains a model on random crops, flipped at random, of images (3, H, W) in uint8. Nothing waits for the device."""
    draws = np.random.default_rng(seed)
    height, width = (size - model.crop + 1 for size in images[0].shape[1:])
    optimizer = torch.optim.AdamW(model.parameters(), model.learning_rate, fused=images[0].is_cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.learning_rate, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
        corners = draws.integers((len(images), height, width), size=(batch, 3)).tolist()
        windows = [
            (number, slice(top, top + model.crop), slice(left, left + model.crop)) for number, top, left in corners
        ]
        axes = tuple(axis for axis in (-1, -2) if draws.random() < 0.5)
        crops = torch.stack([images[number][:, rows, columns] for number, rows, columns in windows]).flip(axes) / 255
        truth = torch.stack([targets[number][:, rows, columns] for number, rows, columns in windows])
        loss = model.loss(perturb(crops) if perturb else crops, model.flip(truth, axes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
