"""Measures whether normalization helps or harms the segmentation of nuclei, on MoNuSeg.

pip install -e ".[evidence]" && python examples/segment_nuclei.py --json nuclei.json --plot nuclei.png

A run is one method with one seed. The seed draws the images to train, validate and test on (20, 5 and 5 of 30; six
seeds test each image once), the first weights, and the crops; they are the same for all methods. What a network is
trained and tested on is normalized by its method.

Harm is measured by networks that were trained on raw images: their Dice coefficient on normalized images, as a share
of that on raw ones. Methods that change more color may harm more, so the change of each is also scaled, in CIELAB,
until every image has moved by the same mean dE76 over its tissue.

Methods normalize to the default target, center 1 of CAMELYON17. The peers take a mosaic of its images as reference;
"to an image" is one of the images trained on, drawn by the seed. Peers that are not installed are left out. What
classify_labs.py calls colornormnet, perturbstain and control is normalize, perturb and mean-match here.
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from camelyon17 import CENTERS, add_data_option, read_center
from figures_file import check_outputs, earlier_runs, write_figures
from kornia.color import lab_to_rgb
from monuseg import FOLDERS, Sample, aggregated_jaccard, dice, digest, overlaps, panoptic_quality, read_monuseg, split
from nuclei_networks import MODELS, Model, fit
from nuclei_tables import plot, print_tables
from peers import PEERS, Normalize, lab_of, mean_match, tissue
from torch import Tensor
from tqdm import tqdm

from stainnorm_transform import NormalizeStain, PerturbStain, __version__
from stainnorm_transform.cli.options import add_device, path_name
from stainnorm_transform.resources import choose_device, cores, in_order

CENTER, SIDE = 1, 512  # of CAMELYON17, the default target; of its tiles, and of its field the middle
CHANGES = (5, 10)  # mean dE76 over the tissue at which methods are compared
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)  # of the probability of a nucleus
OURS, CONTROL, TO_IMAGE = "ColorNormNet", "mean match (control)", " to an image"
PEER_OF = {
    "Reinhard": "Reinhard (tiatoolbox)",
    "Macenko": "Macenko (torchstain)",
    "Vahadane": "Vahadane (tiatoolbox)",
}
Run = dict[str, Any]


class Method(NamedTuple):
    """How images are normalized, by its name, and how those trained on are perturbed."""

    label: str
    normalizer: str | None = None
    perturb: PerturbStain | None = None


METHODS = {
    "nothing": Method("nothing"),
    "normalize": Method(OURS, OURS),
    "perturb": Method("PerturbStain", None, PerturbStain()),
    "both": Method(f"{OURS} and PerturbStain", OURS, PerturbStain()),
    "mean-match": Method(CONTROL, CONTROL),
    **{name.lower(): Method(name, name) for name in PEER_OF},
    **{f"{name.lower()}-image": Method(f"{name}{TO_IMAGE}", f"{name}{TO_IMAGE}") for name in PEER_OF},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, needed=(*FOLDERS, f"camelyon17/center_{CENTER}"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="0 or more each")
    parser.add_argument("--model", choices=MODELS, default="unet", help="hovernet needs a GPU (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training, a batch each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="crops of a step (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--json", type=path_name, help="file for the figures of all runs, written after each")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file has, and do the others")
    parser.add_argument("--plot", type=path_name, help="PNG file for a plot of the figures")
    options = parser.parse_args()
    if min(options.steps, options.batch) < 1 or min(options.seeds) < 0:
        parser.error("expected --steps and --batch of 1 or more, and --seeds of 0 or more")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.backends.cudnn.benchmark = True
    recipe = {"model": options.model, "steps": options.steps, "batch": options.batch}
    try:
        check_outputs(options.json, options.plot)
        device = choose_device(options.device)
        samples = read_monuseg(options.data / "monuseg", MODELS[options.model].crop)
        settings = {"version": __version__, "images": digest(samples), **recipe}
        done = earlier_runs(options.json, options.resume, settings)
    except ValueError as error:
        parser.error(str(error))
    tiles = [middle(image).to(device) for image in read_center(options.data, CENTER).values()]
    bench = Bench(samples, tiles, device, **recipe)
    if missing := [METHODS[method].label for method in options.methods if not bench.has(method)]:
        print(f"left out, as the library is not installed: {', '.join(missing)}", file=sys.stderr)
    asked = dict.fromkeys((method, seed) for seed in options.seeds for method in options.methods if bench.has(method))
    known = {(run["method"], run["seed"]) for run in done}
    for method, seed in tqdm([run for run in asked if run not in known], unit="run", disable=None):
        done.append(bench.run(method, seed))
        found = np.mean([row["dice"] for row in done[-1]["scores"]])
        tqdm.write(f"{METHODS[method].label}, seed {seed}: Dice {found:.3f}", file=sys.stderr)
        if options.json:
            write_figures(options.json, settings, "runs", done)
    runs = [run for run in done if (run["method"], run["seed"]) in asked]
    labels = {key: METHODS[key].label for key in options.methods}
    print_tables(runs, labels)
    if options.plot:
        plot(runs, labels, options.plot)


def middle(image: Tensor) -> Tensor:
    top, left = (max(0, size - SIDE) // 2 for size in image.shape[-2:])
    return image[:, top : top + SIDE, left : left + SIDE]


class Bench:
    """Images, in the colors of every normalizer, and the runs on them."""

    def __init__(
        self, samples: list[Sample], tiles: list[Tensor], device: torch.device, model: str, steps: int, batch: int
    ) -> None:
        self.samples, self.device, self.steps, self.batch = samples, device, steps, batch
        self.model = MODELS[model]
        self.images = [sample.image.to(device) for sample in samples]
        self.truth = [sample.instances.to(device) for sample in samples]
        self.targets = list(in_order(self.model.targets, self.truth, cores()))
        self.makers = makers(tiles, device)
        self.made: dict[tuple[str, int], Normalize] = {}
        self.changed: dict[tuple[str, int, int], Tensor] = {}

    def has(self, method: str) -> bool:
        """Whether its library is installed."""
        normalizer = METHODS[method].normalizer
        return normalizer is None or normalizer in self.makers

    def normalized(self, name: str | None, seed: int, number: int) -> Tensor:
        """An image in the colors of a normalizer. One that cannot be normalized stays as it is, and is named."""
        if name is None:
            return self.images[number]
        seed = seed if name.endswith(TO_IMAGE) else 0
        if (name, seed, number) not in self.changed:
            image = self.images[number]
            try:
                self.changed[name, seed, number] = self.normalizer(name, seed)(image)
            except Exception as error:
                print(f"{self.samples[number].name}: left as it is, {name} raised {error!r}", file=sys.stderr)
                self.changed[name, seed, number] = image
        return self.changed[name, seed, number]

    def normalizer(self, name: str, seed: int) -> Normalize:
        if (name, seed) not in self.made:
            training = split(len(self.samples), seed)[0]
            drawn = self.images[training[np.random.default_rng(seed).integers(len(training))]]
            self.made[name, seed] = self.makers[name](drawn)
        return self.made[name, seed]

    def run(self, method: str, seed: int) -> Run:
        """Trains a network, and scores what it finds in the test images."""
        _, normalizer, perturb = METHODS[method]
        training, validation, test = split(len(self.samples), seed)
        images = {number: self.normalized(normalizer, seed, number) for number in (*training, *validation, *test)}
        torch.manual_seed(seed)
        model = self.model().to(self.device)
        inputs, targets = [images[number] for number in training], [self.targets[number] for number in training]
        fit(model, inputs, targets, perturb, self.steps, self.batch, seed)
        with torch.inference_mode():
            threshold = self.best_threshold(model, {number: images[number] for number in validation})
            scores = [self.score(model, images[number], number, threshold) for number in test]
            organs = sorted({self.samples[number].organ for number in training})
            run = {"method": method, "seed": seed, "threshold": threshold, "organs": organs, "scores": scores}
            if method == "nothing":
                run["kept"] = [row for number in test for row in self.kept(model, seed, number, threshold)]
        return run

    def best_threshold(self, model: Model, images: dict[int, Tensor]) -> float:
        """The threshold with the largest mean Dice coefficient in the images to validate on."""
        chances = {number: model.predict(image / 255)[0] for number, image in images.items()}
        means = [
            np.mean([dice(chance > limit, self.truth[n]) for n, chance in chances.items()]) for limit in THRESHOLDS
        ]
        return THRESHOLDS[int(np.argmax(means))]

    def score(self, model: Model, image: Tensor, number: int, threshold: float) -> dict[str, Any]:
        found = torch.as_tensor(model.separate(model.predict(image / 255), threshold)).to(self.device)
        truth, sample = self.truth[number], self.samples[number]
        nuclei = overlaps(found, truth)
        return {
            "image": sample.name,
            "organ": sample.organ,
            "dice": dice(found, truth),
            "aji": aggregated_jaccard(nuclei),
            "pq": panoptic_quality(nuclei),
        }

    def kept(self, model: Model, seed: int, number: int, threshold: float) -> list[dict[str, Any]]:
        """What is found in a test image after each normalizer, as it is and scaled to each change."""
        raw, sample = self.images[number], self.samples[number]
        lab = lab_of(raw)
        inside = tissue(lab)

        def found(image: Tensor) -> float:
            return dice(model.predict(image / 255)[0] > threshold, self.truth[number])

        before, rows = found(raw), []
        for name in self.makers:
            normalized = self.normalized(name, seed, number)
            full = color_change(lab, normalized, inside)
            for change in (None, *CHANGES):
                share = change / full if change and full else 1.0
                image = normalized if share == 1 else scaled(lab, normalized, share)
                rows.append(
                    {
                        "normalizer": name,
                        "image": sample.name,
                        "organ": sample.organ,
                        "change": change,
                        "share": share,
                        "dE": full if share == 1 else color_change(lab, image, inside),
                        "before": before,
                        "after": found(image),
                    }
                )
        return rows


def makers(tiles: list[Tensor], device: torch.device) -> dict[str, Callable[[Tensor], Normalize]]:
    """The normalizers that there are, each made from an image that was trained on, which most do not need."""
    found: dict[str, Callable[[Tensor], Normalize]] = {}
    for center in sorted(CENTERS, key=lambda center: center != CENTER):
        name = OURS if center == CENTER else f"{OURS} to center {center}"
        weights = f"camelyon17-center{center}"
        found[name] = lambda _, weights=weights: NormalizeStain.pretrained(weights).to(device)
    found[CONTROL] = lambda _: mean_match(tiles)
    mosaic = torch.cat(tiles, dim=-1)
    for name, peer in PEER_OF.items():
        library, make = PEERS[peer]
        if importlib.util.find_spec(library):
            found[name] = lambda _, make=make: on_cpu(make, mosaic)
            found[f"{name}{TO_IMAGE}"] = lambda drawn, make=make: on_cpu(make, drawn)
    return found


def on_cpu(make: Callable[[Tensor], Normalize], reference: Tensor) -> Normalize:
    """A peer, which works there, for images on any device; the result does not depend on the images before."""

    def seeded(function: Callable[[Tensor], Any], image: Tensor) -> Any:
        np.random.seed(0)  # noqa: NPY002 - scikit-learn's dictionary learning, in tiatoolbox's Vahadane, draws from it.
        return function(image.cpu())

    normalize = seeded(make, reference)
    return lambda image: seeded(normalize, image).to(image.device)


def color_change(lab: Tensor, after: Tensor, inside: Tensor) -> float:
    """Mean dE76 from Lab (3, H, W) to an image in uint8, over the pixels inside."""
    return float((lab_of(after) - lab).norm(dim=0)[inside].mean())


def scaled(lab: Tensor, normalized: Tensor, share: float) -> Tensor:
    """The image in uint8 that is changed from Lab (3, H, W) by a share of what it was normalized by, also above 1."""
    image = lab_to_rgb(lab + share * (lab_of(normalized) - lab))
    return (255 * image).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    main()
