"""Teacher embeddings computed elsewhere, read by sample index from memory or a mapped file."""

from collections.abc import Collection, Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.distillation.teachers.cache_format import CacheError, count_rows
from lightning_rkd.utils.arrays import load_integers, load_rows, refuse_repeated

_WHO = "CachedTeacher.from_array"


class ArrayReader:
    """Rows of an array or file; see :meth:`~lightning_rkd.CachedTeacher.from_array`."""

    def __init__(self, array: Any, ids: Any = None) -> None:
        if isinstance(ids, Iterable) and not isinstance(ids, Sized):
            ids = list(ids)
        self._arguments, (self.x, beside) = (array, ids), load_rows(array, _WHO)
        ids, rows = beside.get("ids") if ids is None else ids, len(self.x)
        self.has_ids = ids is not None
        self.ids, self.order = (load_integers(ids, rows, "ids", _WHO) if self.has_ids else torch.arange(rows)).sort()
        refuse_repeated(self.ids, _WHO)

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
