"""Approximate nearest rows by faiss, for galleries that are too large to compare every query with every row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.metrics._nearest import LAST, Frame, Gallery
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.imports import require

_TRAINING = 64  # rows per list from which k-means finds the centres
_ROUNDS = 10


@dataclass(frozen=True)
class Faiss:
    """An approximate search for ``EmbeddingRetrieval(engine=Faiss())``: faiss's inverted file of whole rows (IVF-flat).

    The gallery is sorted into lists around centres found by k-means, and a query is compared with the rows of the few
    lists whose centres are nearest. Neighbours found are in true order up to the rounding of float32; rows in other
    lists are missed. A missed row of the query's class lowers the values, one of another class raises them. ``probes``
    equal to ``lists`` misses nothing.

    The error depends on the data: compare with the exact search on a part of your rows. On 200,000 rows of 20,000
    classes around independent centres, a hard case, the defaults took 22 s and the exact search 73; recall at 1 was
    0.983 instead of 0.989, but MAP@R 0.69 instead of 0.81. 256 probes gave 0.79 and were no faster than the exact
    search (docs/speed/retrieval.md).

    The index holds the gallery in float32 in CPU memory, whatever ``store_dtype``, and during training 64 rows per
    list; neither counts as ``working_memory``. faiss uses as many threads as PyTorch, in one process only.

    Args:
        lists: Number of lists; ``None`` is four times the square root of the gallery rows.
        probes: Lists searched for each query, or more where they are too short to hold four times its neighbours.

    Raises:
        ImportError: faiss is not installed.

    Reference:
        Johnson, Douze, Jégou: Billion-scale similarity search with GPUs, 2017, arXiv:1702.08734.

    Example:
        >>> from lightning_rkd.metrics import EmbeddingRetrieval
        >>> metric = EmbeddingRetrieval(engine=Faiss())
        >>> metric.update(torch.tensor([[0.0], [1.0], [3.0], [3.6]]), torch.tensor([0, 0, 1, 1]))
        >>> float(metric.compute()["recall_at_1"])
        1.0
    """

    lists: int | None = None
    probes: int = 64

    def __post_init__(self) -> None:
        for name, value in (("lists", self.lists), ("probes", self.probes)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        require("faiss", extra="faiss")

    def check_ranks(self, group: Any) -> None:
        """Raise under several processes, since an index lives in one."""
        size = rank_and_size(group)[1]
        if size > 1:
            raise ValueError(
                f"engine=Faiss() searches in one process, but there are {size}; evaluate on one device, "
                "Trainer(devices=1), or leave engine out: the exact search spreads the gallery over all processes"
            )

    def search(
        self, gallery: Gallery, rows: Tensor, own: Tensor, queries: Tensor, width: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield queries with (q, width) scores and places of their nearest gallery rows; infinity where they are few.

        ``queries`` are numbers of rows, and ``own`` is the position of each row itself in the gallery, or -1.
        """
        with _use_threads_of_pytorch():
            frame = gallery.frame()
            index = self._build_index(gallery, frame, width)
            for few in torch.split(queries, min(gallery.sizes.longest, gallery.sizes.queries(width))):
                points = _as_array(gallery, rows[few], frame, queries=True)
                scores, found = (torch.from_numpy(x).to(rows.device) for x in index.search(points, width + 1))
                missing = found < 0
                places = torch.where(missing, LAST, gallery.places[found.clamp(min=0)])
                scores = torch.where(missing | (found == own[few, None]), torch.inf, scores)
                places, by_place = places.sort(dim=1)
                scores, by_score = scores.gather(1, by_place).sort(dim=1, stable=True)
                yield few, scores[:, :width], places.gather(1, by_score)[:, :width]

    def _build_index(self, gallery: Gallery, frame: Frame, width: int) -> Any:
        faiss = require("faiss", extra="faiss")
        n = len(gallery.rows)
        lists = min(self.lists or max(1, 4 * isqrt(n)), n)
        dim = len(frame[0])
        centres = faiss.IndexFlatL2(dim)
        index = faiss.IndexIVFFlat(centres, dim, lists)
        index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = _ROUNDS, 1, _TRAINING
        sample = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: _TRAINING * lists].sort().values
        index.train(_as_array(gallery, gallery.rows[sample.to(gallery.rows.device)], frame))
        for rows in torch.split(gallery.rows, gallery.sizes.longest):
            index.add(_as_array(gallery, rows, frame))
        index.nprobe = min(lists, max(self.probes, -(-4 * width * lists // n)))
        return index


def _as_array(gallery: Gallery, rows: Tensor, frame: Frame, queries: bool = False) -> Any:
    """Points in the frame of the gallery as a float32 NumPy array."""
    parts = torch.split(rows, gallery.sizes.longest)
    return torch.cat([gallery.points(part, frame, queries).float() for part in parts]).cpu().numpy()


@contextmanager
def _use_threads_of_pytorch() -> Iterator[None]:
    """Give faiss, which brings an OpenMP of its own, the number of threads of PyTorch."""
    faiss = require("faiss", extra="faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
