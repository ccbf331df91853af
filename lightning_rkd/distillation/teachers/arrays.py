"""Embeddings that came from elsewhere, by sample index: in memory, or mapped from a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from lightning_rkd.distillation.teachers.cache_format import CacheError, within


class Array:
    """Rows that came from elsewhere, in memory or mapped from a file.

    They are read as those of :class:`~lightning_rkd.distillation.teachers.cache_format.Shards` are.

    Args:
        array: (N, D): a tensor, an array, or the path of a ``.npy`` or ``.safetensors`` file.
        ids: Row of the root data set of each; ``None`` is row i for row i.

    Raises:
        ValueError: Not floating-point numbers (N, D), or ids that do not belong to them.
    """

    views = 1

    def __init__(self, array: Any, ids: Any) -> None:
        self.path = str(array) if isinstance(array, str | os.PathLike) else None
        self._given = self.path or array
        x, own = _loaded(self._given)
        ids = own if ids is None else ids
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                f"CachedTeacher.from_array: embeddings must be floating point (N, D), got {x.dtype} of {tuple(x.shape)}"
            )
        self.x: Tensor | None = x
        self.ids = self.order = None
        if ids is not None:
            given = torch.as_tensor(ids if isinstance(ids, Tensor | np.ndarray) else list(ids))
            if given.shape != x.shape[:1] or given.is_floating_point():
                raise ValueError(
                    f"CachedTeacher.from_array: ids must be {len(x)} integers, one for each row, got {given.dtype} of "
                    f"{tuple(given.shape)}"
                )
            self.ids, self.order = given.long().sort()
            if len(x) > 1 and bool((repeated := self.ids[1:] == self.ids[:-1]).any()):
                raise ValueError(f"CachedTeacher.from_array: the id {int(self.ids[1:][repeated][0])} is given twice")
        self.rows = len(x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"x": None} if self.path else {})

    @property
    def fingerprint(self) -> str:
        """Tells arrays of different ranks apart, roughly: sizes, ids, and a few rows."""
        some = self._x()[:: max(1, self.rows // 64)].double()
        ids = None if self.ids is None else int(self.ids.sum())
        return f"{self.rows} rows, sum of some {float(some.sum())!r}, ids {ids}"

    def check_size(self, size: int) -> None:
        """Compare with the number of rows of the root data set.

        Raises:
            CacheError: Without ids they must be the same.
        """
        if self.ids is None and self.rows != size:
            raise CacheError(
                f"CachedTeacher.from_array: {self.rows} rows without ids, but the root data set has {size}: pass "
                "ids=..., the row of the data set that each belongs to"
            )

    def located(self, indices: Tensor) -> Tensor:
        """Where the rows with these indices are.

        Raises:
            CacheError: There is no such row.
        """
        if self.ids is None or self.order is None:
            return within(indices, self.rows, "the array")
        at = torch.searchsorted(self.ids, indices).clamp(max=max(0, self.rows - 1))
        known = self.ids[at] == indices
        if not bool(known.all()):
            raise CacheError(f"there is no embedding with the id {int(indices[~known][0])}, which the batch asks for")
        return self.order[at]

    def read(self, rows: Tensor, view: int) -> dict[str, Tensor]:
        """The embeddings of rows, float32, or float64 where they came so; there is one view."""
        x = self._x().index_select(0, rows)
        return {"/embedding": x if x.dtype == torch.float64 else x.float()}

    def _x(self) -> Tensor:
        if self.x is None:
            self.x, _ = _loaded(self._given)
        return self.x


def _loaded(given: Any) -> tuple[Tensor, Tensor | None]:
    """The rows, memory-mapped where they are a file, and the ids beside them."""
    if isinstance(given, Tensor):
        return given.detach().cpu(), None
    if isinstance(given, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(given)), None
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"CachedTeacher.from_array takes a tensor, an array or a path, got {type(given).__name__}")
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"the embeddings {str(path)!r} do not exist")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), None
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            ids = tensors.pop("ids", None)
            if len(tensors) != 1:
                raise ValueError(f"it holds {sorted(tensors)} instead of one tensor (and ids)")
            return tensors.popitem()[1], ids
    except (ValueError, EOFError, OSError, TypeError, safetensors.SafetensorError) as error:
        raise CacheError(f"the embeddings {str(path)!r} cannot be read ({error}); write the file again") from error
    raise ValueError(f"CachedTeacher.from_array reads .npy and .safetensors files, got {str(path)!r}")
