"""Nearest rows by faiss: approximate, for galleries that are too large to compare every query with every row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.metrics._nearest import LAST, Gallery
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.imports import require

_TRAINING = 64  # rows per list from which the lists' centres are found
_ROUNDS = 10


@dataclass(frozen=True)
class Faiss:
    """An approximate search for ``EmbeddingRetrieval(engine=Faiss())``: faiss's inverted file of whole rows (IVF-flat).

    The gallery is sorted into lists around centres found by k-means, and a query is compared with the rows of the few
    lists whose centres are nearest. What it finds is in true order up to the rounding of float32; what lies in other
    lists is missed. A missed row of the query's class lowers the values, one of another class raises them. ``probes``
    equal to ``lists`` misses nothing.

    How far that is from exact depends on the data: compare both on a part of your rows. On 200,000 rows of 20,000
    classes around independent centres, a hard case, the defaults took 22 s where the exact search took 73; recall at 1
    was 0.983 in place of 0.989, but MAP@R 0.69 in place of 0.81. 256 probes brought it to 0.79, and were no faster than
    the exact search (docs/speed/retrieval.md).

    The index holds the gallery in float32 in CPU memory, whatever ``store_dtype``; for a while there are also the rows
    from which centres are found, 64 a list. Neither counts as ``working_memory``. It has as many threads as PyTorch.
    Several processes are refused.

    Args:
        lists: Number of lists; ``None`` is four times the square root of the gallery rows.
        probes: Lists searched for each query, or more where they are too short to hold four times its neighbours.

    Raises:
        ImportError: Where faiss is not installed.

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

    def refuse_ranks(self, group: Any) -> None:
        """An index lives in one process."""
        size = rank_and_size(group)[1]
        if size > 1:
            raise ValueError(
                f"engine=Faiss() searches in one process, but there are {size}; evaluate on one device, "
                "Trainer(devices=1), or leave engine out: the exact search spreads the gallery over all of them"
            )

    def search(
        self, gallery: Gallery, rows: Tensor, own: Tensor, queries: Tensor, width: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Nearest gallery rows of queries, some of them at a time.

        Args:
            gallery: All of it.
            rows: (N, D) among which the queries are.
            own: (N,) position in the gallery of each row itself, which it must not find, or -1.
            queries: (Q,) which of the rows ask.
            width: Neighbours to find.

        Yields:
            Queries, scores and places of ``width`` neighbours of each, nearest first, ties by place; infinity where
            there are fewer.
        """
        with _threads():
            frame = gallery.frame()
            index = self._index(gallery, frame, width)
            for few in torch.split(queries, min(gallery.room.longest, gallery.room.queries(width))):
                scores, found = (
                    torch.from_numpy(x).to(rows.device)
                    for x in index.search(_points(gallery, rows[few], frame, True), width + 1)
                )
                missing = found < 0
                places = torch.where(missing, LAST, gallery.places[found.clamp(min=0)])
                scores = torch.where(missing | (found == own[few, None]), torch.inf, scores)
                places, by_place = places.sort(dim=1)
                scores, by_score = scores.gather(1, by_place).sort(dim=1, stable=True)
                yield few, scores[:, :width], places.gather(1, by_score)[:, :width]

    def _index(self, gallery: Gallery, frame: tuple[Tensor, float], width: int) -> Any:
        faiss = require("faiss", extra="faiss")
        n = len(gallery.rows)
        lists = min(self.lists or max(1, 4 * isqrt(n)), n)
        dim = len(frame[0])
        centres = faiss.IndexFlatL2(dim)
        index = faiss.IndexIVFFlat(centres, dim, lists)
        index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = _ROUNDS, 1, _TRAINING
        sample = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: _TRAINING * lists].sort().values
        index.train(_points(gallery, gallery.rows[sample.to(gallery.rows.device)], frame))
        for rows in torch.split(gallery.rows, gallery.room.longest):
            index.add(_points(gallery, rows, frame))
        index.nprobe = min(lists, max(self.probes, -(-4 * width * lists // n)))
        return index


def _points(gallery: Gallery, rows: Tensor, frame: tuple[Tensor, float], asking: bool = False) -> Any:
    """What faiss compares: centred and scaled, so that float32 loses nothing to an offset or a magnitude."""
    x = torch.cat(
        [
            ((gallery.points(part, asking) - frame[0]) * frame[1]).float()
            for part in torch.split(rows, gallery.room.longest)
        ]
    )
    return x.cpu().numpy()


@contextmanager
def _threads() -> Iterator[None]:
    """As many as PyTorch has; faiss brings an OpenMP of its own, with its own number."""
    faiss = require("faiss", extra="faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
