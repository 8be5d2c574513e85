"""Times slides file to file, in parts, and against libvips and tiatoolbox.

pip install -e ".[slides]" pyvips pyvips-binary && python examples/benchmark_slides.py SLIDE --json slides.json

All methods run in this process, in every round, each round in another order. Slides are in memory before, where there
is room, and nothing waits until what is written is on disk; TMPDIR says where that is. Parts that are sampled, and
tiatoolbox, are scaled to the whole slide by its pixels. libvips shifts all colors by one offset, white as well, and its
JPEG of this quality is RGB, which makes larger files; tiatoolbox writes none. Peers that are not installed are left
out.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from benchmark import machine, quiet
from camelyon17 import read
from tqdm import tqdm

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import file_name, path_name
from stainnorm_transform.color import shift_table
from stainnorm_transform.resources import cores, in_order
from stainnorm_transform.slides import Slide, SlideFormat, slide_normalizer, write_slide
from stainnorm_transform.slides.pyramid import BLOCK, TILE, encoder
from stainnorm_transform.slides.reader import corners
from stainnorm_transform.slides.tables import Pixels, look_up_pixels

FORMAT = SlideFormat()
# Blocks in memory, for the parts that are sampled; and for tiatoolbox.
SAMPLED_BLOCKS = 64
PEER_BLOCKS = 16
# Pixels of levels of half the size each, of those of the largest.
ALL_LEVELS = 4 / 3
FIRST = "transcode, decoded by OpenSlide"
# What a process is said to hold at its peak may be what its parent held when it started it: let a small one do that.
WATCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
IMPORTS = "import torch, torchvision"
COMMAND = "import sys; from stainnorm_transform.cli.main import main; sys.exit(main())"
Seconds = Callable[[], float]


class SlideByOpenSlide(Slide):
    """A slide whose pixels OpenSlide decodes, where Slide would decode its tiles directly."""

    def __init__(self, path: Path) -> None:
        import openslide

        super().__init__(path)
        self.opened = openslide.OpenSlide(path)

    def pixels(self, x: int, y: int, width: int, height: int, level: int = 0) -> Pixels:
        return np.asarray(self.opened.read_region((x, y), level, (width, height)))

    def close(self) -> None:
        super().close()
        self.opened.close()


class Methods:
    """What is timed on a slide, by name: each call returns its seconds, those of a sample for the whole slide."""

    def __init__(self, path: Path, folder: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.out = folder / "out.tif"
        self.normalize = NormalizeStain.pretrained()
        self.encode = encoder(FORMAT.quality)
        with Slide(path) as slide:
            self.width, self.height = slide.dimensions
            self.fixed, self.offset, tiles, *_ = slide_normalizer(slide, self.normalize, threads)
            places = np.array(list(corners(self.width, self.height, BLOCK)))
            self.places = np.random.default_rng(0).permutation(places)[:SAMPLED_BLOCKS].tolist()
            self.blocks = list(in_order(partial(self.block, slide), self.places, threads))
        self.table = self.make_table()
        sampled = f"scaled from {len(self.blocks)} blocks of {BLOCK} x {BLOCK}"
        self.calls: dict[str, Seconds] = {
            FIRST: lambda: self.to_file(FIRST, lambda: self.transcode(SlideByOpenSlide)),
            "transcode": lambda: self.to_file("transcode", lambda: self.transcode(Slide)),
            "normalize": lambda: self.to_file("normalize", self.write),
            "part: decode": lambda: self.decode(Slide),
            "part: decode, by OpenSlide": lambda: self.decode(SlideByOpenSlide),
            f"part: estimate, from {tiles} tiles": self.estimate,
            "part: make the table": lambda: clock(self.make_table),
            f"part: look up, {sampled}": self.look_up,
            f"part: encode all levels, {sampled}": self.encode_levels,
        }
        self.bytes: dict[str, int] = {}
        self.left_out: list[str] = []
        self.add_vips()
        self.add_tiatoolbox()

    def block(self, slide: Slide, corner: tuple[int, int]) -> Pixels:
        x, y = corner
        return slide.pixels(x, y, min(BLOCK, self.width - x), min(BLOCK, self.height - y))

    def for_all(self, function: Callable[..., object], items: Iterable[object]) -> None:
        collections.deque(in_order(function, items, self.threads), maxlen=0)

    def scale(self, blocks: list[Pixels]) -> float:
        """How many times these blocks make the slide."""
        return self.width * self.height / sum(block.shape[0] * block.shape[1] for block in blocks)

    def to_file(self, name: str, call: Callable[[], object]) -> float:
        """Seconds of what writes a file; its size is kept, and it is removed."""
        seconds = clock(call)
        self.bytes[name] = self.out.stat().st_size
        self.out.unlink()
        return seconds

    def write(self) -> None:
        with Slide(self.path) as slide:
            fixed = slide_normalizer(slide, self.normalize, self.threads).normalize
            write_slide(slide, self.out, fixed, FORMAT, self.threads)

    def transcode(self, kind: type[Slide]) -> None:
        with kind(self.path) as slide:
            write_slide(slide, self.out, None, FORMAT, self.threads)

    def decode(self, kind: type[Slide]) -> float:
        with kind(self.path) as slide:
            return clock(lambda: self.for_all(partial(self.block, slide), corners(self.width, self.height, BLOCK)))

    def estimate(self) -> float:
        with Slide(self.path) as slide:
            return clock(lambda: slide_normalizer(slide, self.normalize, self.threads))

    def make_table(self) -> np.ndarray:
        return shift_table(-self.fixed.fixed_map, self.fixed.preserve_white).numpy()

    def look_up(self) -> float:
        look_up = partial(look_up_pixels, table=self.table)
        return clock(lambda: self.for_all(look_up, self.blocks)) * self.scale(self.blocks)

    def encode_levels(self) -> float:
        def encode_block(block: Pixels) -> list[bytes]:
            places = corners(block.shape[1], block.shape[0], TILE)
            return [self.encode(block[y : y + TILE, x : x + TILE]) for x, y in places]

        return clock(lambda: self.for_all(encode_block, self.blocks)) * self.scale(self.blocks) * ALL_LEVELS

    def add_vips(self) -> None:
        if importlib.util.find_spec("pyvips") is None:
            self.left_out.append("libvips, as pyvips is not installed")
            return
        os.environ["VIPS_CONCURRENCY"] = str(self.threads)  # is read at the first import
        import pyvips

        pyvips.cache_set_max(0)
        logging.getLogger("pyvips").setLevel(logging.WARNING)  # tiatoolbox shows more
        try:
            page = pyvips.Image.tiffload(str(self.path), page=0)
        except pyvips.Error:
            self.left_out.append("libvips, which does not read it as TIFF")
            return
        if (page.width, page.height, page.bands, page.format) != (self.width, self.height, 3, "uchar"):
            self.left_out.append("libvips, as the first page of the file is not the slide in RGB")
            return

        def write(shifted: bool) -> None:
            image = pyvips.Image.tiffload(str(self.path), page=0, access="sequential")
            if shifted:
                a, b = self.offset.tolist()
                image = image.colourspace("lab").linear([1, 1, 1], [0, -a, -b]).colourspace("srgb").cast("uchar")
            options = {"compression": "jpeg", "Q": FORMAT.quality, "tile_width": TILE, "tile_height": TILE}
            image.tiffsave(str(self.out), tile=True, pyramid=True, bigtiff=True, **options)

        for name, shifted in {"libvips: transcode": False, "libvips: shift in Lab": True}.items():
            self.calls[name] = partial(self.to_file, name, partial(write, shifted))

    def add_tiatoolbox(self) -> None:
        if importlib.util.find_spec("tiatoolbox") is None:
            self.left_out.append('tiatoolbox, which is not installed: pip install -e ".[compare]"')
            return
        from threadpoolctl import threadpool_limits
        from tiatoolbox.tools.stainnorm import get_normalizer

        target = read(sorted((Path(__file__).parent / "tiles").rglob("*.png"))[0]).permute(1, 2, 0).numpy().copy()
        places, blocks = self.places[:PEER_BLOCKS], self.blocks[:PEER_BLOCKS]

        def transform(normalizer: object, slide: Slide, corner: tuple[int, int]) -> None:
            with contextlib.suppress(ValueError, ZeroDivisionError):  # glass without tissue
                normalizer.transform(self.block(slide, corner)[..., :3].copy())

        def seconds(normalizer: object) -> float:
            # One tile a thread is faster than several threads for one.
            with Slide(self.path) as slide, threadpool_limits(1):
                return clock(lambda: self.for_all(partial(transform, normalizer, slide), places)) * self.scale(blocks)

        for name in ("Reinhard", "Macenko"):
            normalizer = get_normalizer(name.lower())
            normalizer.fit(target)
            sampled = f"only pixels, scaled from {len(blocks)} tiles of {BLOCK} x {BLOCK}"
            self.calls[f"tiatoolbox: {name}, {sampled}"] = partial(seconds, normalizer)


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_mb(*command: str) -> float:
    """MB that a new Python process holds at its peak; the command is what follows ``-c``."""
    arguments = [sys.executable, "-c", WATCH, sys.executable, "-c", *command]
    told = int(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)
    return told * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """All figures of a slide."""
    with tempfile.TemporaryDirectory(prefix="stainnorm-") as folder:
        out = Path(folder, "normalized")
        # It also brings the slide into memory.
        peak = peak_mb(COMMAND, "normalize", str(path), "--out", str(out), "--threads", str(options.threads))
        methods = Methods(path, Path(folder), options.threads)
        names = list(methods.calls)
        times: dict[str, list[float]] = {name: [] for name in names}
        with tqdm(total=options.rounds * len(names), desc=path.name, leave=False, disable=None) as bar:
            for number in range(options.rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    times[name].append(methods.calls[name]())
                    bar.update()
    rows = []
    for name, values in times.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        ratio = float(np.median(np.divide(values, times[FIRST])))
        figures = {"seconds": median, "quartiles": [low, high], "ratio": ratio, "rounds": values}
        rows.append({"method": name, **figures, "bytes": methods.bytes.get(name)})
    about = {"slide": path.name, "width": methods.width, "height": methods.height, "bytes": path.stat().st_size}
    return {**about, "normalize_peak_mb": peak, "left_out": methods.left_out, "rows": rows}


def print_slide(found: dict[str, object]) -> None:
    gigapixels = found["width"] * found["height"] / 1e9
    print(f"\n**{found['slide']}, {found['width']} x {found['height']}, {found['bytes'] / 1e6:.1f} MB**\n")
    print(f"| method | s | s a gigapixel | time, of {FIRST} | MB written | of the slide's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found["rows"]:
        seconds = np.array([row["seconds"], *row["quartiles"]])
        times = ["{:.2f} ({:.2f} to {:.2f})".format(*values) for values in (seconds, seconds / gigapixels)]
        sizes = [f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / found['bytes']:.2f}"] if row["bytes"] else ["", ""]
        print("|", " | ".join([row["method"], *times, f"{row['ratio']:.2f}", *sizes]), "|")
    print(
        f"\nMemory of a new process that normalizes it, at its peak: {found['normalize_peak_mb']:.0f} MB.", flush=True
    )
    for line in found["left_out"]:
        print(f"Left out: {line}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "slides",
        nargs="+",
        type=file_name,
        metavar="SLIDE",
        help="a slide; https://openslide.cs.cmu.edu/download/openslide-testdata has some",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="of every method (default: %(default)s)")
    parser.add_argument("--json", type=path_name, help="file to write all figures to")
    options = parser.parse_args()
    quiet(options.threads)
    imports = peak_mb(IMPORTS)
    slides = []
    for path in options.slides:
        slides.append(measure(path, options))
        print_slide(slides[-1])
    import openslide

    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("tifffile", "imagecodecs")]
    made_on = ", ".join([machine(options.threads), f"OpenSlide {openslide.__library_version__}", *packages])
    print(f"\nMemory of a new process, at its peak, for {IMPORTS!r} alone: {imports:.0f} MB.")
    print(f"{made_on}. Median of {options.rounds} rounds; in brackets the quartiles.")
    print(f"Time, of {FIRST}: median of the ratio in each round.")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": made_on, "imports_mb": imports, "slides": slides}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
