"""What a run will do: which files are normalized, and where each result goes. Nothing is written yet."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stainnorm_transform.folders import record
from stainnorm_transform.folders.images import SUFFIXES
from stainnorm_transform.folders.normalizer import FileNormalizer, Settings
from stainnorm_transform.folders.outcome import Outcome
from stainnorm_transform.slides import formats, is_slide


@dataclass(frozen=True)
class Plan:
    """The files of a run.

    Attributes:
        normalizer: what makes a result of a file.
        outputs: the result of each file.
        clashes: why some of these files are not normalized: others would be written to the same place.
        left_out: files of other kinds, and folders of results, in the folders that were searched.
        replaces: whether some outputs are there by other weights.
    """

    normalizer: FileNormalizer
    outputs: dict[Path, Path]
    clashes: dict[Path, str]
    left_out: set[Path]
    replaces: bool

    def unfinished(self, again: bool, outcomes: dict[Path, Outcome]) -> dict[Path, Path]:
        """The files that are to be done, with their outputs.

        Args:
            again: whether finished files are done again. Where results of other weights are replaced they are not, so
                that a run that was interrupted goes on.
            outcomes: gets those of the files that are finished, or cannot be done.
        """
        work = {}
        for path, output in self.outputs.items():
            if path in self.clashes:
                outcomes[path] = Outcome(error=self.clashes[path])
                continue
            try:
                if (again and not self.replaces) or not self.normalizer.is_current(path, output):
                    work[path] = output
                else:
                    outcomes[path] = self.normalizer.earlier(output)
            except Exception as error:
                outcomes[path] = Outcome.of(error, path)
        return work


def make_plan(settings: Settings, inputs: Sequence[Path], reserved: Sequence[str] = (), again: bool = False) -> Plan:
    """Finds the files of a run, and refuses to overwrite files that are no results, and results of other weights.

    Args:
        settings: how files are normalized.
        inputs: files and folders.
        reserved: names in the output folder that are taken, besides that of the record.
        again: whether results of other weights may be replaced.

    Raises:
        ValueError: an input does not exist, there is no image, an output is taken, the settings cannot be used, or
            there are results of other weights.
        ImportError: a file is a slide, and the packages for slides are not installed.
        OSError: a folder, the weights or the record cannot be read.
    """
    out = settings.out
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"expected a folder to write to, got {out}, which is none")
    for folder in inputs:
        if folder.is_dir() and out.is_dir() and folder.samefile(out):
            raise ValueError(f"{folder} is an input, whose files would be overwritten: choose another output folder")
    normalizer = FileNormalizer(settings)
    left_out: set[Path] = set()
    found = find(inputs, out, left_out=left_out)
    named = {path: normalizer.output_name(path, below) for path, below in found.items()}
    outputs = place(named, out, [record.NAME, *reserved])
    if settings.offsets is not None:
        settings.offsets.check(outputs)
    if any(is_slide(path) for path in outputs):
        formats.packages()
    there = {path: output for path, output in outputs.items() if os.path.lexists(output)}
    # In this order, as another run may make some meanwhile: their lines come first.
    normalizer.record.reread()
    for path, output in there.items():
        if not normalizer.record.has(output):
            raise ValueError(
                f"{path} would be written to {output}, which is there and was not made by this command: choose another "
                "output folder, or remove it"
            )
    others = [name for output in there.values() if (name := normalizer.record.other_weights(output))]
    if others and not again:
        raise ValueError(
            f"{len(others)} of the results in {out} were made with other weights ({others[0]}): add --again to replace "
            "them, or choose another output folder"
        )
    return Plan(normalizer, outputs, find_clashes(outputs), left_out, bool(others))


def find(
    inputs: Sequence[Path],
    skip: Path | None = None,
    suffixes: tuple[str, ...] = SUFFIXES + formats.SUFFIXES,
    left_out: set[Path] | None = None,
) -> dict[Path, Path]:
    """The images and slides among files and in folders, searched recursively: real path -> path below its input folder.

    Files that are parts of a slide are left out. Links to folders are not followed. Folders below a given one that hold
    results of ``stainnorm normalize`` are not searched.

    Args:
        inputs: images, slides and folders.
        skip: a folder not to search.
        suffixes: of files in folders.
        left_out: gets the files in folders that have other suffixes, and the folders of results.

    Raises:
        ValueError: an input does not exist, or there is no image.
        OSError: a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    real = functools.cache(os.path.realpath)
    skipped = _identity(skip) if skip and skip.exists() else None
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given} does not exist")
        for path in _walk(given, skipped, suffixes, left_out) if given.is_dir() else [given]:
            below = path.relative_to(given) if given.is_dir() else Path(path.name)
            # Not abspath, for which link/../a is ./a.
            found.setdefault(Path(real(path.parent), path.name), below)
    if not found:
        raise ValueError(f"no images ({', '.join(suffixes)}) in {', '.join(str(given) for given in inputs)}")
    return {path: found[path] for path in formats.without_parts(found)}


def place(found: Mapping[Path, Path], out: Path, reserved: Sequence[str] = ()) -> dict[Path, Path]:
    """Which file each image is written to: ``out`` plus a path below it.

    Args:
        found: each image with its path below ``out``.
        out: the folder to write to.
        reserved: names in ``out`` that are taken.

    Raises:
        ValueError: an output is an input or reserved.
    """
    outputs = {path: out / below for path, below in found.items()}
    originals = {_identity(path) for path in outputs}
    for path, output in outputs.items():
        # The same file may have several names, by links, mounts or letter case.
        if os.path.exists(output) and _identity(output) in originals:
            raise ValueError(f"{output} is an input and would be overwritten: choose another output folder")
        if output.relative_to(out).parts[0] in reserved:
            raise ValueError(f"{path} would be written to {output}, which is for something else: rename it")
    return outputs


def find_clashes(outputs: Mapping[Path, Path]) -> dict[Path, str]:
    """The files of which others would be written to the same place, and that in words."""
    sources: dict[Path, list[Path]] = {}
    for path, output in outputs.items():
        sources.setdefault(output, []).append(path)
    return {
        path: f"{others[others[0] == path]} would be written to {output} as well: rename one, or use two output folders"
        for output, others in sources.items()
        if len(others) > 1
        for path in others
    }


def _identity(path: str | os.PathLike[str]) -> object:
    """What tells whether two paths lead to one file."""
    try:
        state = os.stat(path)
    except OSError:  # It is missing, or a link that leads nowhere or to itself.
        return os.path.realpath(path)
    return state.st_dev, state.st_ino


def _walk(folder: Path, skip: object, suffixes: tuple[str, ...], left_out: set[Path] | None) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=refuse):
        slides = {name[:-5] for name in files if name.lower().endswith(".mrxs")}
        for name in sorted(folders):
            path = Path(where, name)
            if name in slides or (skip is not None and _identity(path) == skip):
                folders.remove(name)
            elif record.is_of_results(path):
                folders.remove(name)
                if left_out is not None:
                    left_out.add(path)
        folders.sort()
        for name in sorted(files):
            path = Path(where, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(suffixes) or (".dcm" in suffixes and is_slide(path)):
                yield path
            elif left_out is not None:
                left_out.add(path)
