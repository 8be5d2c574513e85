"""The command stainnorm in a process of its own, which can be stopped at a given place, and sees a terminal or a limit.

The process is a fork, where nothing speaks against it: a new interpreter takes seconds to import torch.
"""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import struct
import sys
import tempfile
import termios
from pathlib import Path

import pytest
import torch

from stainnorm_transform import files
from stainnorm_transform.cli.main import main

# CUDA and the threads of its gradients do not survive a fork.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn")


@dataclasses.dataclass(frozen=True)
class Result:
    status: int  # less than 0: the signal that ended it
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Stop:
    """Sends the process a signal when a function of the package is called for the ``count``-th time."""

    where: str
    count: int
    number: int = signal.SIGKILL

    def prepare(self):
        owner, _, name = f"stainnorm_transform.{self.where}".rpartition(".")
        owner, calls = pkgutil.resolve_name(owner), []
        function = getattr(owner, name)

        def stop(*arguments, **options):
            calls.append(1)
            if len(calls) == self.count:
                os.kill(os.getpid(), self.number)
            return function(*arguments, **options)

        setattr(owner, name, stop)


def begin(arguments, stop=None, largest_file=None, encoding="utf-8", stderr=None):
    """Starts the command; returns a function that waits for its end and gives the result."""
    folder = Path(tempfile.mkdtemp(prefix="stainnorm-apart-"))
    options = (list(map(os.fsdecode, arguments)), folder, stop, largest_file, encoding, stderr)
    process = CONTEXT.Process(target=_run, args=options)
    process.start()

    def wait():
        process.join()
        out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(folder)
        return Result(process.exitcode, out, err)

    return wait


def run_apart(arguments, **options):
    """Runs the command: see ``begin``."""
    return begin(arguments, **options)()


def in_a_terminal(arguments, columns):
    """What the command prints to a terminal on its stderr, line by line; it must succeed."""
    if CONTEXT.get_start_method() != "fork":
        pytest.skip("run on Linux without CUDA: the terminal is handed on by a fork")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    wait = begin(arguments, stderr=theirs)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 1000):
            printed += chunk
    os.close(ours)
    assert wait().status == 0, printed
    return printed.decode().replace("\n", "\r").split("\r")


def _run(arguments, folder, stop, largest_file, encoding, stderr):
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(stderr if number == 2 and stderr is not None else handle, number)
    sys.stdout, sys.stderr = (open(number, "w", encoding=encoding) for number in (1, 2))  # noqa: SIM115
    if stderr is not None:
        os.close(stderr)
    # As in a new process.
    files.remove_leftovers.cache_clear()
    torch.set_num_threads(1)
    # A job in the background is born with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if stop is not None:
        stop.prepare()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
