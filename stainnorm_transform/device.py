"""Where to compute."""

from __future__ import annotations

import torch


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
