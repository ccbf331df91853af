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


_failed: set[str] = set()


def native(name: str) -> ModuleType | None:
    """A module of this package whose functions numba or Triton compile, or ``None`` where they do not work.

    The first call compiles, which takes seconds, or reads what an earlier process compiled; so call it ahead of work
    that is timed.

    Args:
        name: File name without ``.py``.

    Example:
        >>> native("no_such_kernel") is None
        True
    """
    return None if name in _failed or os.environ.get(SWITCH) == "0" else _imported(name)


def give_up(name: str, error: Exception) -> None:
    """Leave a kernel out from now on, which a first call has shown not to run here, such as for want of a C compiler.

    Example:
        >>> give_up("no_such_kernel", RuntimeError("no C compiler"))
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _failed.add(name)
    _log.warning("The kernel %s does not run here, PyTorch's operations do its work, slower: %s", name, error)


@functools.cache
def _imported(name: str) -> ModuleType | None:
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
    kind = torch.device(device).type
    if kind in ("cpu", "cuda"):
        for name in ("distance", "angle"):
            kernel = native(f"{name}_{kind}")
            if kernel is not None and kind == "cuda":  # Triton compiles at the first launch
                kernel.launch_once(torch.device(device))
