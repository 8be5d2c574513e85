"""Times NormalizeStain, its parts and PerturbStain against kornia, OpenCV and the peers that are installed.

pip install -e ".[compare]" && python examples/benchmark.py --json benchmark.json

All methods of a table run in this process, one after the other, again and again, and the median of these rounds counts.
Images are real tissue of CAMELYON17 where it is found, else the synthetic tiles. Peers that are not installed, and
CUDA where there is none, are left out.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from camelyon17 import add_data_option, read, read_center
from lab_augmentations import AUGMENTATIONS
from peers import to_array
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name
from stainnorm_transform.color import look_up, shift_ab, shift_table

OFFSET = torch.tensor([12.5, -24.2])
MAP = torch.tensor([[12.5, 2.25, 5.5, 1.25], [-24.2, -0.5, -1.25, -0.5]])
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of a table: what is timed, on which images."""

    table: str
    method: str
    images: int
    side: int
    dtype: str = "uint8"
    device: str = "cpu"

    def call(self, data: Path) -> Call:
        return METHODS[self.method](self, picture(self, data))


def picture(case: Case, data: Path) -> Tensor:
    """Tissue (images, 3, side, side), or (3, side, side) for one."""
    if (data / "camelyon17").is_dir():
        tile = max(read_center(data, 2).values(), key=Tensor.numel)
    else:
        tile = read(sorted((Path(__file__).parent / "tiles").rglob("*.png"))[0])
    repeats = [-(-case.side // size) for size in tile.shape[-2:]]
    tissue = tile.repeat(1, *repeats)[:, : case.side, : case.side].contiguous()
    if case.images > 1:
        tissue = torch.stack([tissue.roll(97 * number, dims=-1) for number in range(case.images)])
    return (tissue if case.dtype == "uint8" else tissue / 255).to(case.device, getattr(torch, case.dtype))


# --- Methods: each prepares an image and returns what is timed.


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled anew for each shape and dtype."""
    return torch.compile(function, dynamic=False)


@functools.cache
def pretrained(device: str) -> NormalizeStain:
    return NormalizeStain.pretrained().to(device)


def ours(case: Case, image: Tensor) -> Call:
    normalize = pretrained(case.device)
    return lambda: normalize(image)


def ours_dense(case: Case, image: Tensor) -> Call:
    normalize = pretrained(case.device)
    return lambda: shift_ab(image, -normalize.estimate_map(image, dense=True))


def estimate(case: Case, image: Tensor) -> Call:
    normalize = pretrained(case.device)
    return lambda: normalize.estimate_map(image)


def shift(case: Case, image: Tensor) -> Call:
    offset = OFFSET.to(case.device)
    return lambda: shift_ab(image, offset)


def shift_by_map(case: Case, image: Tensor) -> Call:
    color_map = MAP.to(case.device)
    return lambda: shift_ab(image, color_map)


def table(case: Case, image: Tensor) -> Call:
    colors = shift_table(MAP)
    return lambda: look_up(image, colors)


def making_the_table(case: Case, image: Tensor) -> Call:
    return lambda: shift_table(MAP)


def copy(case: Case, image: Tensor) -> Call:
    return lambda: image.clone()


def kornia_shift(image: Tensor, offset: Tensor) -> Tensor:
    from kornia.color import lab_to_rgb, rgb_to_lab

    lab = rgb_to_lab(image if image.is_floating_point() else image / 255)
    moved = lab_to_rgb(lab + torch.nn.functional.pad(offset, (1, 0))[:, None, None])
    return moved if image.is_floating_point() else (255 * moved).round().to(torch.uint8)


def ours_compiled(case: Case, image: Tensor) -> Call:
    normalize = compiled(pretrained(case.device))
    return lambda: normalize(image)


def shift_compiled(case: Case, image: Tensor) -> Call:
    offset = OFFSET.to(case.device)
    return lambda: compiled(shift_ab)(image, offset)


def kornia(case: Case, image: Tensor) -> Call:
    offset = OFFSET.to(case.device)
    return lambda: kornia_shift(image, offset)


def kornia_compiled(case: Case, image: Tensor) -> Call:
    offset = OFFSET.to(case.device)
    return lambda: compiled(kornia_shift)(image, offset)


def opencv(case: Case, image: Tensor) -> Call:
    """8 bits a channel of Lab, so not exact."""
    import cv2

    array = image.permute(1, 2, 0).numpy().copy()
    moved = [round(float(value)) for value in OFFSET]

    def call() -> np.ndarray:
        lab = cv2.cvtColor(array, cv2.COLOR_RGB2LAB)
        cv2.add(lab, (0, *moved, 0), dst=lab)
        return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)

    return call


def tiatoolbox(name: str) -> Callable[[Case, Tensor], Call]:
    def make(case: Case, image: Tensor) -> Call:
        from tiatoolbox.tools.stainnorm import get_normalizer

        array = image.permute(1, 2, 0).numpy().copy()
        normalizer = get_normalizer(name)
        normalizer.fit(array[::-1])
        return lambda: normalizer.transform(array.copy())

    return make


def torchstain(name: str) -> Callable[[Case, Tensor], Call]:
    def make(case: Case, image: Tensor) -> Call:
        import torchstain

        normalizer = getattr(torchstain.normalizers, name)(backend="torch")
        images = image.reshape(-1, *image.shape[-3:])
        normalizer.fit(images[0].flip(-1).float())
        arguments = {"stains": False} if name == "MacenkoNormalizer" else {}
        return lambda: [normalizer.normalize(image.float(), **arguments) for image in images]

    return make


def augmentation(name: str) -> Callable[[Case, Tensor], Call]:
    """As its users call it: a batch at once where it takes one, else image by image."""

    def make(case: Case, image: Tensor) -> Call:
        chosen = AUGMENTATIONS[name]
        images = image.reshape(-1, *image.shape[-3:])
        change = chosen.make(images, 0)
        if not chosen.of_arrays:
            return lambda: change(images)
        arrays = [to_array(each) for each in images]
        return lambda: [change(array) for array in arrays]

    return make


AUGMENTERS = {
    "PerturbStain": augmentation("perturbstain"),
    "HEStain (albumentations)": augmentation("hestain"),
    "RandStainNA (by OpenCV)": augmentation("randstainna"),
    "HED jitter (by skimage)": augmentation("hed-jitter"),
    "ColorJitter (torchvision)": augmentation("color-jitter"),
    "StainAugmentor (tiatoolbox)": augmentation("stain-augmentor"),
}
METHODS: dict[str, Callable[[Case, Tensor], Call]] = {
    "NormalizeStain": ours,
    "NormalizeStain, compiled": ours_compiled,
    "NormalizeStain, dense estimate": ours_dense,
    "estimate alone": estimate,
    "shift": shift,
    "shift by a map": shift_by_map,
    "shift, compiled": shift_compiled,
    "table": table,
    "making the table": making_the_table,
    "copy": copy,
    "kornia": kornia,
    "kornia, compiled": kornia_compiled,
    "OpenCV, 8-bit Lab": opencv,
    "Reinhard (tiatoolbox)": tiatoolbox("reinhard"),
    "Macenko (tiatoolbox)": tiatoolbox("macenko"),
    "Vahadane (tiatoolbox)": tiatoolbox("vahadane"),
    "Reinhard (torchstain)": torchstain("ReinhardNormalizer"),
    "Macenko (torchstain)": torchstain("MacenkoNormalizer"),
} | AUGMENTERS
NEEDS = {
    "kornia": "kornia",
    "OpenCV": "cv2",
    "(tiatoolbox)": "tiatoolbox",
    "(torchstain)": "torchstain",
    "(albumentations)": "albumentations",
    "(by skimage)": "skimage",
}
CUDA_METHODS = (
    "NormalizeStain",
    "NormalizeStain, compiled",
    "estimate alone",
    "shift",
    "shift by a map",
    "shift, compiled",
    "copy",
)
# torchstain's Reinhard works on the CPU alone.
CUDA_PEERS = {"uint8": ("kornia", "Macenko (torchstain)"), "float32": ("kornia", "kornia, compiled"), "float16": ()}
SLOW = ("Vahadane (tiatoolbox)", "NormalizeStain, dense estimate")
SLOW_ROUNDS = 3


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The tables; ratios are to the first row of each."""
    for side in (256, 512, 1024):
        title = f"Whole normalizer, one uint8 tile of {side} x {side}"
        for method in METHODS:
            if method in AUGMENTERS:
                continue
            if method in ("NormalizeStain", "estimate alone") or method.endswith(("(tiatoolbox)", "(torchstain)")):
                yield Case(title, method, 1, side)
    for images, side in ((1, 96), (1, 256), (1, 512), (32, 256)):
        for method in AUGMENTERS:
            yield Case(f"Augmentation, uint8, {images} x 3 x {side} x {side}", method, images, side)
    for images, side in ((32, 256), (4, 1024)):
        title = f"Shift by a given offset, float32, {images} x 3 x {side} x {side}"
        for method in ("shift", "shift by a map", "kornia", "kornia, compiled"):
            yield Case(title, method, images, side, "float32")
        yield Case(
            f"Whole normalizer, float32, {images} x 3 x {side} x {side}", "NormalizeStain", images, side, "float32"
        )
    for method in ("table", "shift", "shift by a map", "copy", "making the table", "kornia", "OpenCV, 8-bit Lab"):
        yield Case("Shift by a given offset, one uint8 image of 4096 x 4096", method, 1, 4096)
    for side in (256, 1024, 4096, *((16384,) if options.large else ())):
        for method in ("NormalizeStain", "table"):
            yield Case(f"How cost grows, {method}, uint8", method, 1, side)
    if torch.cuda.is_available():
        for images, side in ((32, 256), (32, 1024), (64, 1024)):
            for dtype, peers in CUDA_PEERS.items():
                for method in (*CUDA_METHODS, *peers):
                    yield Case(f"CUDA, {dtype}, {images} x 3 x {side} x {side}", method, images, side, dtype, "cuda")
        yield Case("CUDA, dense estimate", "NormalizeStain, dense estimate", 32, 1024, "float32", "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, needed=())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORDS", help="tables whose title contains this")
    parser.add_argument("--large", action="store_true", help="also an image of 16384 x 16384: takes 3 GB")
    parser.add_argument("--json", type=path_name, help="file to write all figures to")
    options = parser.parse_args()
    quiet(options.threads)
    chosen = [case for case in cases(options) if options.only in case.table and available(case.method)]
    rows = []
    for title in dict.fromkeys(case.table for case in chosen):
        rows += measure([case for case in chosen if case.table == title], options)
        print_table(title, [row for row in rows if row["table"] == title])
    print(f"\n{machine(options.threads)}. Median of {options.rounds} rounds; in brackets the quartiles.")
    print(f"{' and '.join(SLOW)}: {SLOW_ROUNDS} rounds.")
    print(
        "Memory: by how much a new process grows, at its peak, in the first call on the image; its result is included."
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.threads), "rows": rows}, indent=1) + "\n")


def quiet(threads: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(threads)


def available(method: str) -> bool:
    return all(importlib.util.find_spec(module) for words, module in NEEDS.items() if words in method)


def measure(cases: list[Case], options: argparse.Namespace) -> list[dict[str, object]]:
    calls = {}
    memory = {}
    for case in cases:
        memory[case] = peak_memory(case, options)
        calls[case] = case.call(options.data)
        calls[case]()
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for number in tqdm(range(options.rounds), cases[0].table, leave=False, disable=None):
        for case, call in calls.items():
            if number < SLOW_ROUNDS or case.method not in SLOW:
                timer = Timer("call()", globals={"call": call}, num_threads=options.threads)
                once = timer.timeit(1).median
                times[case].append(timer.timeit(max(1, round(0.05 / once))).median if once < 0.05 else once)
    first = float(np.median(times[cases[0]]))
    rows = []
    for case, values in times.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        pixels = case.images * case.side**2
        rows.append(
            {
                **asdict(case),
                "ms": 1e3 * median / case.images,
                "ms_quartiles": [1e3 * low / case.images, 1e3 * high / case.images],
                "seconds_per_gigapixel": 1e9 * median / pixels,
                "peak_mb": memory[case],
                "ratio": median / first,
            }
        )
    return rows


def peak_memory(case: Case, options: argparse.Namespace) -> float:
    """MB by which the memory of a new process, or that of the device, grows in the first call, at its peak."""
    if case.device == "cuda":
        return memory_of(case, options.data)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=quiet, initargs=(options.threads,)) as pool:
        return pool.apply(memory_of, (case, options.data))


def memory_of(case: Case, data: Path) -> float:
    if case.device == "cuda":
        call = case.call(data)
        call()  # libraries and their buffers, kernels that are compiled
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    replace(case, side=64).call(data)()  # libraries and their buffers
    call = case.call(data)
    if not Path("/proc/self/clear_refs").exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    # On Linux, 5 sets the peak to what is in use.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1e6


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def machine(threads: int) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, {threads} thread(s){gpu}, torch {torch.__version__}"


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    growing = len({row["side"] for row in rows}) > 1
    print(f"\n**{title}**\n")
    print(f"| {'side' if growing else 'method'} | ms an image | s a gigapixel | MB | time, of the first row |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["ms_quartiles"]
        print(
            f"| {row['side'] if growing else row['method']} | {row['ms']:.3g} ({low:.3g} to {high:.3g}) | "
            f"{row['seconds_per_gigapixel']:.3g} | {row['peak_mb']:.0f} | {row['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
