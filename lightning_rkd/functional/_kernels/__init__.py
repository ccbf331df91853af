"""Optional kernels compiled by numba or Triton; each gives the same results as the PyTorch code it replaces."""

import functools
import logging
import os
from importlib import import_module
from types import ModuleType

import torch

SWITCH = "LIGHTNING_RKD_NATIVE"
"""Environment variable that disables the native kernels where it is 0."""

_log = logging.getLogger(__name__)
_failed: set[str] = set()


@functools.cache
def native(name: str) -> ModuleType | None:
    """Module of this package by its file name, or ``None`` where numba or Triton are missing or do not work.

    The first call compiles, which takes seconds, or reads what an earlier process compiled; call it before timing.
    """
    if not name or name in _failed or os.environ.get(SWITCH) == "0":
        return None
    try:
        return import_module(f"{__name__}.{name}")
    except Exception as error:  # a broken installation fails in many ways
        _log.info("No native %s kernel, PyTorch's operations do the work: %s", name, error)
        return None


def give_up(name: str, error: Exception) -> None:
    """Disable a kernel whose first call has failed, for example because there is no C compiler."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _failed.add(name)
    native.cache_clear()
    _log.warning("The kernel %s does not run here, PyTorch's operations do its work, slower: %s", name, error)


def load(device: torch.device | str) -> None:
    """Compile the kernels of the losses for a device before the first step, by calls with and without gradient."""
    from lightning_rkd.functional import rkd_loss, squared_distances

    if torch.device(device).type in ("cpu", "cuda"):
        with torch.inference_mode(False), torch.enable_grad():  # an evaluation loads them too
            rows = torch.eye(64, device=device, requires_grad=True)
            torch.autograd.grad(rkd_loss(rows, rows), rows)
            torch.autograd.grad(squared_distances(rows).sum(), rows)
        rkd_loss(rows.detach(), rows.detach())
