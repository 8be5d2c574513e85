"""What a run computes with: the device, cores, and threads."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_device(name: str | None) -> torch.device:
    """The device of this name, by default cuda where there is one, else cpu.

    Raises:
        ValueError: it is not here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"expected a device that is here, like cpu or cuda:0, got {name!r}") from error
    return device


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result]:
    """As ``map``, in threads, a few items ahead and no more, so that memory is bounded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_is_fork = False


def _remember_the_fork() -> None:
    global _is_fork
    _is_fork = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_the_fork)


def safe_after_fork() -> contextlib.AbstractContextManager[None]:
    """In a forked process, one torch thread: those of the parent are not there, and torch would wait for them."""
    return one_torch_thread() if _is_fork and not torch.compiler.is_compiling() else contextlib.nullcontext()


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keeps torch from splitting small work among threads, which wait for each other where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
