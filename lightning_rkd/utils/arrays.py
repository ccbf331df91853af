"""Rows of embeddings from tensors, arrays and memory-mapped files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor


def load_rows(source: Any, who: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Load floating point rows (N, D), and the ids and labels stored beside them.

    The source is a tensor, an array, or the path of a ``.npy`` file or of a ``.safetensors`` file with one tensor of
    rows and optionally others called ``ids`` and ``labels``; files are memory-mapped.
    """
    rows, others = _load(source, who)
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"{who} takes floating point (N, D), got {rows.dtype} {tuple(rows.shape)}")
    return rows, others


def load_integers(source: Any, rows: int, name: str, who: str) -> Tensor:
    """Load a column of one integer per row: a tensor, an array, an iterable, or the path of a ``.npy`` file."""
    path = isinstance(source, str | os.PathLike)
    try:
        given = _load(source, who)[0] if path else torch.as_tensor(source if hasattr(source, "shape") else list(source))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: {name} must be {rows} integers, or a path: {error}") from error
    if given.shape != (rows,) or given.is_floating_point():
        raise ValueError(f"{who}: {name} must be {rows} integers, got {given.dtype} {tuple(given.shape)}")
    return given.long()


def refuse_repeated(ids: Tensor, who: str) -> None:
    """Raise if one of the ascending ids is given twice."""
    if len(repeated := ids[1:][ids[1:] == ids[:-1]]):
        raise ValueError(f"{who}: the id {int(repeated[0])} is given twice")


def _load(source: Any, who: str) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(source, Tensor):
        return source.detach().cpu(), {}
    if isinstance(source, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(source)), {}
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{who} takes a tensor, an array or a path, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"the embeddings {str(path)!r} do not exist")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), {}
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            others = {name: tensors.pop(name) for name in ("ids", "labels") if name in tensors}
            if len(tensors) != 1:
                raise ValueError(f"it holds {sorted(tensors)} instead of one tensor (and ids, labels)")
            return tensors.popitem()[1], others
    except (ValueError, EOFError, OSError, TypeError, safetensors.SafetensorError) as error:
        if "Python objects" in str(error):
            raise ValueError(
                f"the embeddings {str(path)!r} are Python objects: save np.stack(rows).astype(np.float32)"
            ) from error
        raise ValueError(f"the embeddings {str(path)!r} cannot be read ({error}); write the file again") from error
    raise ValueError(f"{who} reads .npy and .safetensors files, got {str(path)!r}")
