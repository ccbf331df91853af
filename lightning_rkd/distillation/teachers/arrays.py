"""Teacher embeddings computed elsewhere, read by sample index from memory or a mapped file."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from lightning_rkd.distillation.teachers.cache_format import CacheError, count_rows


class ArrayReader:
    """Rows of an array or file; see :meth:`~lightning_rkd.CachedTeacher.from_array`."""

    def __init__(self, array: Any, ids: Any = None) -> None:
        if not (ids is None or isinstance(ids, Tensor | np.ndarray)):
            ids = list(ids)
        self._arguments, (self.x, stored_ids) = (array, ids), _load(array)
        x, ids = self.x, stored_ids if ids is None else ids
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"CachedTeacher.from_array takes floating point (N, D), got {x.dtype} {tuple(x.shape)}")
        self.has_ids = ids is not None
        given = torch.as_tensor(ids) if self.has_ids else torch.arange(len(x))
        if given.shape != x.shape[:1] or given.is_floating_point():
            raise ValueError(
                f"CachedTeacher.from_array: ids must be {len(x)} integers, got {given.dtype} {tuple(given.shape)}"
            )
        self.ids, self.order = given.long().sort()
        if len(repeated := self.ids[1:][self.ids[1:] == self.ids[:-1]]):
            raise ValueError(f"CachedTeacher.from_array: the id {int(repeated[0])} is given twice")

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayReader, self._arguments  # a path, not the rows of its file

    @property
    def fingerprint(self) -> str:
        """Sizes and sums, to compare the arrays of several ranks."""
        some = float(self.x[:: max(1, len(self.ids) // 64)].double().sum())
        return f"{len(self.ids)} rows, sum of some {some!r}, sum of ids {int(self.ids.sum())}"

    def check_data(self, loader: Any, ignore: Collection[str] = ()) -> None:
        """Compare the number of rows with that of the root data set, where there are no ids."""
        rows, size = len(self.ids), count_rows(loader)
        if not self.has_ids and rows != size:
            raise CacheError(
                f"CachedTeacher.from_array: {rows} rows without ids, but the root data set has {size}: pass ids=..., "
                "the row of the data set for each"
            )

    def read(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """Embeddings of rows of the root data set, (N, D), in float32, or float64 where the array is."""
        at = torch.searchsorted(self.ids, indices).clamp(max=len(self.ids) - 1)
        if len(unknown := indices[self.ids[at] != indices]):
            raise CacheError(f"the batch has the index {int(unknown[0])}, but there is no embedding with this id")
        x = self.x.index_select(0, self.order[at])
        return {"/embedding": x if x.dtype == torch.float64 else x.float()}


def _load(source: Any) -> tuple[Tensor, Tensor | None]:
    """Rows of an array or a file, which is memory-mapped, and the ids stored beside them."""
    if isinstance(source, Tensor):
        return source.detach().cpu(), None
    if isinstance(source, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(source)), None
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"CachedTeacher.from_array takes a tensor, an array or a path, got {type(source).__name__}")
    path = Path(source)
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
