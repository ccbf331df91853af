"""A gallery that was embedded before: an array with ids and labels, or a faiss index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_rkd.utils.arrays import load_integers, load_rows, refuse_repeated
from lightning_rkd.utils.imports import require

_FAISS = (".faiss", ".index")


class StoredGallery:
    """Rows that were embedded before, as the gallery of :class:`AsymmetricRetrieval`.

    Files of arrays are memory-mapped, and each process reads its share of the rows. Of a faiss index the rows are read
    back and searched exactly: an index that compresses rows gives compressed ones.

    Args:
        rows: (N, D): a tensor, an array, or the path of a ``.npy`` file, of a ``.safetensors`` file with one tensor
            (and optionally others called ``ids`` and ``labels``), or of an index written by ``faiss.write_index``
            (``.faiss`` or ``.index``; it may have ids).
        ids: Row of the root data set for each row, a negative number for samples that are not in it; integers, or the
            path of a ``.npy`` file. By default those stored with the rows, or else 0 to N - 1.
        labels: (N,) class of each row, in the same forms. ``None`` takes the labels of the evaluated samples: the
            gallery then holds only rows whose ids are evaluated.

    Raises:
        ValueError: Rows, ids or labels that do not fit.
        MissingExtraError: faiss is not installed, but the file is an index.

    Example:
        >>> gallery = StoredGallery(torch.eye(3), ids=[7, -1, 5], labels=[0, 0, 1])
        >>> len(gallery), gallery.dim
        (3, 3)
    """

    def __init__(
        self,
        rows: str | Path | Tensor | npt.NDArray[Any],
        ids: str | Path | list[int] | Tensor | npt.NDArray[Any] | None = None,
        labels: str | Path | list[int] | Tensor | npt.NDArray[Any] | None = None,
    ) -> None:
        self._arguments = rows, ids, labels
        is_index = isinstance(rows, str | Path) and Path(rows).suffix in _FAISS
        self._rows: Tensor | _FaissRows
        self._rows, beside = _FaissRows.open(Path(str(rows))) if is_index else load_rows(rows, "StoredGallery")
        n = len(self._rows)
        ids, labels = (beside.get(name) if x is None else x for name, x in (("ids", ids), ("labels", labels)))
        self.ids = torch.arange(n) if ids is None else load_integers(ids, n, "ids", "StoredGallery")
        self.labels = None if labels is None else load_integers(labels, n, "labels", "StoredGallery")
        refuse_repeated(self.ids[self.ids >= 0].sort().values, "StoredGallery")

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredGallery, self._arguments  # paths, not the rows of their files

    def __deepcopy__(self, memo: Any) -> StoredGallery:
        return self  # it does not change

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        """Number of columns, D."""
        return int(self._rows.shape[1])

    @property
    def compares_products(self) -> bool:
        """True for a faiss index of inner products."""
        return isinstance(self._rows, _FaissRows) and self._rows.products

    def read(self, positions: Tensor) -> Tensor:
        """Rows at the positions (n,), as (n, D)."""
        return self._rows[positions]


class _FaissRows:
    """Rows of a faiss index by position."""

    def __init__(self, index: Any, keys: Tensor, owner: Any) -> None:
        self.index, self.keys, self.shape = index, keys, (len(keys), index.d)
        self._owner = owner  # frees the index with itself

    @classmethod
    def open(cls, path: Path) -> tuple[_FaissRows, dict[str, Tensor]]:
        """Rows of an index file, and their ids where it has some."""
        faiss = require("faiss", extra="faiss")
        if not path.is_file():
            raise FileNotFoundError(f"the index {str(path)!r} does not exist")
        try:
            mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)  # flat indices too, in later versions
            owner = index = faiss.read_index(str(path), mapped | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise ValueError(f"the index {str(path)!r} cannot be read; write it again, faiss.write_index") from error
        beside = {}
        if isinstance(index, faiss.IndexIDMap):  # the index within numbers its rows itself
            beside["ids"] = torch.from_numpy(faiss.vector_to_array(index.id_map))
            index = faiss.downcast_index(index.index)
        keys = torch.arange(index.ntotal)
        if (lists := faiss.try_extract_index_ivf(index)) is not None:
            inverted = lists.invlists
            held = (faiss.rev_swig_ptr(inverted.get_ids(n), inverted.list_size(n)) for n in range(inverted.nlist))
            keys = torch.cat([torch.from_numpy(x.copy()) for x in held]).sort().values
            lists.set_direct_map_type(faiss.DirectMap.Hashtable)
            beside.setdefault("ids", keys)
        return cls(index, keys, owner), beside

    @property
    def products(self) -> bool:
        """True if the index compares inner products."""
        return bool(self.index.metric_type == require("faiss", extra="faiss").METRIC_INNER_PRODUCT)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return torch.from_numpy(self.index.reconstruct_batch(self.keys[positions].numpy()))
