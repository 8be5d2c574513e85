"""Archives of slides on a Ray cluster: one task a file, and a manifest of what became of each."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from stainnorm_transform.files import check_regular, remove_leftovers, replacing
from stainnorm_transform.folders.normalizer import FileNormalizer, Settings
from stainnorm_transform.folders.outcome import Outcome

MANIFEST = "manifest.csv"
# How often a file is begun again when the process that works on it dies.
RETRIES = 3
# Tasks that are submitted at a time.
AHEAD = 1000
HEADER = ["input", "output", "status", "seconds", "message"]


def package() -> Any:
    """Ray.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f'--ray needs Ray: in a clone of the repository, run pip install ".[ray]" ({error})'
        ) from error
    return ray


def normalize_by_ray(settings: Settings, work: Mapping[Path, Path], again: bool) -> Generator[tuple[Path, Outcome]]:
    """Normalizes files in tasks of their own; yields each with its outcome, in the order in which they end.

    The cluster is that of RAY_ADDRESS, or one that runs on this machine, or else one that is started on it. A task
    takes ``settings.threads`` CPUs, and on a cuda device a GPU.

    Args:
        settings: paths must be the same on every machine.
        work: outputs by input.
        again: whether what is finished is made again.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no machine of the cluster has as many CPUs as a task takes.
    """
    ray = package()
    if not work:
        return
    started = not ray.is_initialized()
    if started:
        # Ray would report its use to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if settings.threads > most:
            raise ValueError(f"no machine of the cluster has {settings.threads} CPUs, but {most:g}: choose --threads")
        gpus = 1 if settings.device is not None and settings.device.startswith("cuda") else 0
        task = ray.remote(num_cpus=settings.threads, num_gpus=gpus, max_retries=RETRIES)(_normalize)
        rest = iter(work.items())
        waiting: dict[Any, Path] = {}
        try:
            while True:
                for path, output in itertools.islice(rest, AHEAD - len(waiting)):
                    waiting[task.remote(settings, path, output, again)] = path
                if not waiting:
                    break
                (ended,), _ = ray.wait(list(waiting), num_returns=1)
                path = waiting.pop(ended)
                try:
                    outcome = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    outcome = Outcome(error=f"the task failed: {error.cause}")
                except ray.exceptions.RayError as error:
                    outcome = Outcome(error=f"its process died {RETRIES + 1} times ({type(error).__name__})")
                yield path, outcome
        finally:
            for reference in waiting:
                ray.cancel(reference)
    finally:
        if started:
            ray.shutdown()
        remove_leftovers.cache_clear()
        for folder in {output.parent for output in work.values()}:
            remove_leftovers(folder)


def _normalize(settings: Settings, path: Path, output: Path, again: bool) -> Outcome:
    """The task. What an earlier attempt has finished, before its process died, is not made again."""
    if _made.get("settings") != settings:
        _made.update(settings=settings, normalizer=FileNormalizer(settings))
    normalizer = _made["normalizer"]
    normalizer.record.reread()
    try:
        if not again and normalizer.is_current(path, output):
            return Outcome()
    except (OSError, ValueError) as error:
        return Outcome.of(error, path)
    with normalizer.record:
        return normalizer.outcome(path, output)


# What the last task of this process used.
_made: dict[str, Any] = {}


def check_manifest(out: Path) -> None:
    """Raises ValueError if the folder has a file of that name that is none."""
    if os.path.lexists(out / MANIFEST):
        check_regular(out / MANIFEST)
        with (out / MANIFEST).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            if file.readline(1000).strip() != ",".join(HEADER):
                raise ValueError(f"{out / MANIFEST} is not a manifest of this command, and is not replaced: move it")


def write_manifest(out: Path, outputs: Mapping[Path, Path], outcomes: Mapping[Path, Outcome]) -> None:
    """Writes ``manifest.csv``: each file of the run with its output and status."""
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(HEADER)
    for path, output in outputs.items():
        outcome = outcomes.get(path)
        if outcome is None:
            status = "not reached"
        else:
            status = "failed" if outcome.error else "finished before" if outcome.earlier else "normalized"
        seconds = "" if outcome is None or not outcome.seconds else f"{outcome.seconds:.1f}"
        message = "" if outcome is None else outcome.error or outcome.note
        writer.writerow([path, output.relative_to(out).as_posix(), status, seconds, message])
    with replacing(out / MANIFEST) as temporary:
        temporary.write_bytes(lines.getvalue().encode(errors="surrogateescape"))
