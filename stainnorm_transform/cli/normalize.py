"""The command ``stainnorm normalize``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from stainnorm_transform import weights
from stainnorm_transform.cli.options import add_device, add_inputs, path_name
from stainnorm_transform.files import printable, remove_leftovers
from stainnorm_transform.folders import overview, report
from stainnorm_transform.folders.normalizer import FileNormalizer, Settings
from stainnorm_transform.folders.offsets import Offsets
from stainnorm_transform.folders.outcome import FULL, Outcome
from stainnorm_transform.folders.plan import Plan, make_plan
from stainnorm_transform.folders.ray import MANIFEST, check_manifest, normalize_by_ray, package, write_manifest
from stainnorm_transform.resources import cores, in_order, one_torch_thread
from stainnorm_transform.slides import SlideFormat, formats, is_slide

OVERVIEW = "overview.png"
RAY_THREADS = 2
# Of the pixels of slides, in micrometers.
MPP = (0.01, 100.0)
# Of files that are left out, this many kinds are named; and of files of which the same is to be said, this many.
KINDS, NAMED = 8, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command, and its description."""
    parser.description = (
        "Gives H&E images (PNG, JPEG, TIFF, BMP, WebP, JPEG 2000; 8-bit RGB or RGBA) and whole slides (what OpenSlide "
        'reads, OME-TIFF and other TIFF; in a clone, pip install ".[slides]") the colors of the target. Every image '
        "gets one color map of its own, so tiles of one slide may differ a little; a slide gets one as a whole, "
        "from a sample of its tissue. A TIFF is a slide if it has tiles, levels, channels in pages of their own, or "
        "67 million pixels or more. Lightness, white (L* > 97) and black (L* < 5) stay, and what has no tissue "
        "keeps its colors. Resolution, ICC profile and transparency are kept, where the format has them. Images keep "
        "their format: JPEG is written at quality 95 without chroma subsampling, all others without loss. Label "
        "masks, images of few flat colors, are copied as they are. Slides become tiled pyramidal BigTIFF; their "
        "label, and the image of the whole glass, which shows it, are left out. Files of other kinds in a folder are "
        "left out, and counted; folders in it that hold results of this command are not searched."
    )
    parser.epilog = (
        "DIR/offsets.csv lists each file, by its full path, with the offset and the color map that were taken from it, "
        "and what these rest on: how many tiles with tissue, and for slides the standard error of the offset in Lab "
        "units, from how far the tiles disagree; of several lines for one output the last counts. The same command "
        "again does what is missing: a file is finished if the list has it and path, size and time of change of the "
        "file and of its result are as listed, as are the weights, the version of the program, and the options that "
        "the result depends on; of a slide of several files only the one that is opened is compared. Results of other "
        "weights are replaced with --again only. Results of files that are gone, or that have another name with --ome,"
        " stay. Files that cannot be normalized are named at the end, as are files whose results would have one name, "
        "and the exit status is then 1."
    )
    add_inputs(parser, "image, slide")
    parser.add_argument(
        "--out", required=True, type=path_name, metavar="DIR", help="folder to write to, in the same subfolders"
    )
    parser.add_argument(
        "--weights",
        default=weights.DEFAULT,
        metavar="NAME|PATH",
        help="the target: a name that 'stainnorm list' shows, or a .safetensors file (default: %(default)s)",
    )
    parser.add_argument(
        "--offset",
        metavar="A,B|CSV",
        help="take away this a*, b* offset instead of an estimate (--offset=-3,4.5), or those of a CSV file with the "
        "columns input (full path, or file name alone), offset_a and offset_b; where the columns map_a, ... of an "
        "offsets.csv are filled, the maps in them, and offset_a and offset_b do not count",
    )
    add_device(parser)
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="images to work on at a time; a slide has all threads to itself (default: one for each core)",
    )
    parser.add_argument(
        "--again", action="store_true", help="normalize finished files again, and those of other weights"
    )
    parser.add_argument(
        "--overview",
        action="store_true",
        help=f"also write DIR/overview.png: up to {overview.PAIRS} files before and after, evenly chosen",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help=f"also write DIR/{report.NAME}, a page of one file for any browser: every file before and after, a "
        "plot and a table of the offsets, and which files to look at",
    )
    _add_slide_options(parser.add_argument_group("slides"))
    parser.set_defaults(run=run)


def _add_slide_options(group: argparse._ArgumentGroup) -> None:
    compression = group.add_mutually_exclusive_group()
    compression.add_argument(
        "--quality",
        type=int,
        default=SlideFormat.quality,
        metavar="Q",
        help="JPEG quality, 1 to 100; color has half the resolution across (4:2:2), below 90 also down (4:2:0) "
        "(default: %(default)s)",
    )
    compression.add_argument("--lossless", action="store_true", help="compress without loss: 3 to 5 times as large")
    layout = group.add_mutually_exclusive_group()
    layout.add_argument(
        "--icc",
        action="store_true",
        help="write no slide, but a color profile with which viewers show it normalized: NAME.icc, and NAME.cube, the "
        "same as a table of colors. It takes seconds a slide",
    )
    layout.add_argument(
        "--ome",
        action="store_true",
        help="write OME-TIFF (.ome.tif), of which OpenSlide sees the largest level only; default: .tif in Aperio's "
        "layout, which OpenSlide reads with all levels, resolution and magnification",
    )
    group.add_argument(
        "--srgb",
        action="store_true",
        help="convert colors to sRGB by the slide's ICC profile first; default: take them as stored, keep the profile",
    )
    group.add_argument(
        "--keep-label", action="store_true", help="keep the images of the label and of the whole glass (macro)"
    )
    group.add_argument(
        "--mpp",
        type=_micrometers,
        metavar="X",
        help="micrometers a pixel, of slides that do not say: 0.25 is 40x. It is written into the result; a slide that "
        "says another fails",
    )
    group.add_argument(
        "--skip-damaged",
        action="store_true",
        help="make white what cannot be decoded of a slide, and name it, instead of failing; made_by in offsets.csv "
        "says how many parts that were",
    )
    group.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help=f"threads for a slide (default: one for each core; with --ray {RAY_THREADS})",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="one task a file on the Ray cluster at RAY_ADDRESS, or else on this machine; all must see INPUT, weights "
        "and DIR under the same paths "
        f'(in a clone, pip install ".[ray]"). Results are also listed in DIR/{MANIFEST}',
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _micrometers(text: str) -> float:
    with contextlib.suppress(ValueError):
        if MPP[0] <= float(text) <= MPP[1]:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected micrometers a pixel, from {MPP[0]:g} to {MPP[1]:g}, got {text!r}")


def run(options: argparse.Namespace) -> int:
    """Normalizes as the options say; returns the exit status."""
    if options.icc and (options.overview or options.srgb):
        other = "--overview, which shows normalized files" if options.overview else "--srgb: the profile does that"
        raise ValueError(f"expected --icc without {other}")
    reserved = [OVERVIEW] * options.overview + [report.NAME] * options.report + [MANIFEST] * options.ray
    plan = make_plan(_settings(options), options.inputs, reserved, options.again)
    if options.report:
        report.check(plan.normalizer.settings.out)
    if options.ray:
        package()
        check_manifest(plan.normalizer.settings.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in {output.parent for output in plan.outputs.values()}:
        remove_leftovers(folder)
    outcomes: dict[Path, Outcome] = {}
    with plan.normalizer.record:
        try:
            _carry_out(plan, outcomes, options)
        finally:
            _summarize(plan, outcomes, options.out)
            if options.ray:
                write_manifest(plan.normalizer.settings.out, plan.outputs, outcomes)
    good = {path: output for path, output in plan.outputs.items() if not outcomes[path].error}
    if options.overview or options.report:
        plan.normalizer.record.reread()
    if options.overview and good:
        overview.write(good, plan.normalizer.record, plan.normalizer.settings.out / OVERVIEW)
    if options.report:
        _write_report(plan, outcomes, options.workers)
    return 1 if any(outcome.error for outcome in outcomes.values()) else 0


def _settings(options: argparse.Namespace) -> Settings:
    # Ray's processes work in folders of their own.
    is_path = options.weights not in weights.names() and os.path.exists(options.weights)
    return Settings(
        out=options.out.absolute(),
        weights=os.path.abspath(options.weights) if is_path else options.weights,
        device=options.device,
        offsets=None if options.offset is None else Offsets.parse(options.offset),
        slide_format=SlideFormat(
            None if options.lossless else options.quality, options.ome, options.keep_label, options.icc
        ),
        to_srgb=options.srgb,
        mpp=options.mpp,
        skip_damaged=options.skip_damaged,
        threads=options.threads or (RAY_THREADS if options.ray else cores()),
    )


def _carry_out(plan: Plan, outcomes: dict[Path, Outcome], options: argparse.Namespace) -> None:
    """Adds the outcome of each file as it ends. Raises OSError where every other file would fail as well."""
    again: bool = options.again
    work = plan.unfinished(again, outcomes)
    if options.ray:
        results = normalize_by_ray(plan.normalizer.settings, work, again)
    else:
        results = _here(plan.normalizer, work, options.workers or cores())
    with contextlib.closing(results):
        for path, outcome in tqdm(results, total=len(plan.outputs), initial=len(outcomes), unit="file", disable=None):
            if outcome.number in FULL:
                go_on = "" if again else "; the same command goes on from here"
                raise OSError(f"{outcome.error}: stopped; what was finished is kept{go_on}")
            outcomes[path] = outcome


def _here(normalizer: FileNormalizer, work: Mapping[Path, Path], workers: int) -> Generator[tuple[Path, Outcome]]:
    """Images several at a time, then slides one by one."""
    slides = [path for path in work if is_slide(path)]
    images = [path for path in work if not is_slide(path)]

    def outcome(path: Path) -> tuple[Path, Outcome]:
        return path, normalizer.outcome(path, work[path])

    several = min(workers, len(images)) > 1
    with (
        one_torch_thread() if several else contextlib.nullcontext(),
        contextlib.closing(in_order(outcome, images, workers)) as results,
    ):
        yield from results
    for path in slides:
        with _SlideBar(path) as bar:
            found = normalizer.outcome(path, work[path], bar.update)
        yield path, found


class _SlideBar:
    """A progress bar that appears with the first pixels of a slide and goes with the last."""

    def __init__(self, path: Path) -> None:
        self.name = printable(path.name)
        self.bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> _SlideBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, pixels: int, total: int) -> None:
        bar = self.bar = self.bar or tqdm(
            total=total, unit="px", unit_scale=True, desc=self.name, leave=False, disable=None
        )
        bar.update(pixels)


def _summarize(plan: Plan, outcomes: Mapping[Path, Outcome], out: Path) -> None:
    good = [path for path in plan.outputs if path in outcomes and not outcomes[path].error]
    earlier = sum(outcomes[path].earlier for path in good)
    by_earlier = f", {earlier} of them by an earlier run" if earlier else ""
    target = plan.normalizer.transform.target
    print(f"{len(good)} of {len(plan.outputs)} images normalized to {target!r} in {printable(str(out))}{by_earlier}")
    for line in _left_out(plan.left_out):
        print(printable(line))
    for line in _notes({path: outcomes[path].note for path in good if outcomes[path].note}):
        print(printable(f"  {line}"))
    failed = [f"{path}: {outcome.error}" for path, outcome in outcomes.items() if outcome.error]
    if failed:
        print(f"{len(failed)} failed:", *map(printable, failed), sep="\n  ", file=sys.stderr)


def _write_report(plan: Plan, outcomes: Mapping[Path, Outcome], workers: int | None) -> None:
    with tqdm(total=len(plan.outputs), desc=report.NAME, unit="file", leave=False, disable=None) as bar:
        missing = report.write(plan.normalizer, plan.outputs, outcomes, workers, bar.update)
    for line in missing:
        print(printable(f"no picture in the report: {line}"), file=sys.stderr)


def _notes(notes: Mapping[Path, str]) -> Iterator[str]:
    """What is to be said of files; where it is the same of many, their number."""
    for note, count in Counter(notes.values()).items():
        same = [path for path in notes if notes[path] == note]
        if count > NAMED:
            yield f"{same[0]} and {count - 1} others: {note}"
        else:
            yield from (f"{path}: {note}" for path in same)


def _left_out(paths: Collection[Path]) -> Iterator[str]:
    """What is said of files of other kinds and of folders of results."""
    folders = sorted(path for path in paths if path.is_dir())
    kinds = Counter(path.suffix.lower() for path in paths if path not in folders)
    # Names such as IM.0001 have no suffix that says a kind.
    named = [
        (kind, count)
        for kind, count in kinds.most_common(KINDS)
        if kind in formats.UNREAD or (1 < len(kind) <= 6 and not kind[1:].isdecimal())
    ]
    if others := sum(kinds.values()) - sum(count for _, count in named):
        named.append(("others", others))
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in named)
        yield f"Left out {sum(kinds.values())} files of kinds that are not read: {counts}"
    unread = sorted(path for path in paths if path.suffix.lower() in formats.UNREAD)
    if unread:
        yield f"Slides among them; convert them {formats.ADVICE}:"
        yield from (f"  {path}" for path in unread[:KINDS])
        if len(unread) > KINDS:
            yield f"  and {len(unread) - KINDS} more"
    if folders:
        yield "Not searched, as they hold results of this command (to normalize them, name them as INPUT):"
        yield from (f"  {folder}" for folder in folders)
