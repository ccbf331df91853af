"""Native kernels behind relations and metrics; each is optional, and gives what the PyTorch code in its place gives."""

from __future__ import annotations

import functools
import logging
import os
from importlib import import_module
from types import ModuleType

import torch

SWITCH = "LIGHTNING_RKD_NATIVE"
"""Set to 0, this environment variable leaves the native kernels for the CPU out."""

_log = logging.getLogger(__name__)


@functools.cache
def native(name: str) -> ModuleType | None:
    """A module of this package whose functions numba compiles, or ``None`` where there is no working numba.

    The first call compiles, which takes seconds, or reads what an earlier process compiled; so call it ahead of work
    that is timed.

    Args:
        name: File name without ``.py``.

    Example:
        >>> native("no_such_kernel") is None
        True
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return import_module(f"{__name__}.{name}")
    except Exception as error:  # a broken installation fails in many ways
        _log.info("No native %s kernel, PyTorch's operations do the work: %s", name, error)
        return None


def load(device: torch.device | str) -> None:
    """Make the kernels of losses ready, so that a run's first step does not wait for their compilation.

    Args:
        device: Where the losses are computed.

    Example:
        >>> load("cpu")
    """
    if torch.device(device).type == "cpu":
        for name in ("distance_cpu", "angle_cpu"):
            native(name)
