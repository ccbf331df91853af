"""Retrieval by embeddings: recall at k, MAP@R and R-precision, exact unless asked otherwise, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._faiss import Faiss
from lightning_rkd.metrics._memory import Room
from lightning_rkd.metrics._nearest import Gallery, close_calls, full_precision
from lightning_rkd.metrics._rows import (
    RowMetric,
    agree,
    checked_column,
    checked_rows,
    first_of_each,
    places_of,
    refuse_two_labels,
    same_as_before,
)
from lightning_rkd.utils.distributed import rank_and_size, row_counts, sum_over_ranks

_SLACK = 4  # neighbours beyond the needed ones, so that a close call at the border can be seen to be one
_MANY = 256
_WORKING_MEMORY = {False: 128 * 2**20, True: 4 * 2**30}  # on a GPU small blocks are all overhead


class EmbeddingRetrieval(RowMetric):
    r"""How well nearest neighbours share a class: recall at k, mean average precision at R, R-precision.

    With :math:`R` the number of gallery rows that share the class of a query, and :math:`y_j` = 1 where its j-th
    nearest gallery row does,

    .. math::
        \text{recall@}k = \max_{j \le k} y_j, \qquad
        \text{R-precision} = \frac1R \sum_{j \le R} y_j, \qquad
        \text{MAP@R} = \frac1R \sum_{j \le R} y_j \, \frac1j \sum_{i \le j} y_i,

    each averaged over the queries. Without ``is_query`` every row asks and is compared with all others but itself;
    with it, the marked rows ask and the others are the gallery.

    What counts, precisely:

    - Rows are used as given. ``"euclidean"`` normalises nothing; ``"cosine"`` compares directions (unit rows rounded
      to float32; a zero row has cosine 0 with everything).
    - The order is that of the exact distances between the stored rows: products in float32 find the neighbours, and
      wherever rounding could have changed the result, float64 decides.
    - Ties go to the lower index, or without indices to the earlier row, counting the rows of rank 0 first.
    - A query without any relevant row in the gallery (a class with one sample) is left out of the means;
      ``left_out`` says how many there were.
    - With ``indices`` a sample that comes twice (the padding of a distributed sampler) counts once; queries and
      gallery are told apart. Without indices nothing is removed.

    Calling the metric only updates it, and returns nothing. Under several processes each keeps its own rows; in
    ``compute()``, which all must enter, labels and indices are exchanged and blocks of the gallery pass by every
    process, so none ever holds all embeddings. A process without any update takes part. Values are the same for any
    number of processes, any order and grouping of the updates (given indices) and any working memory.

    Args:
        k: The k, or several, of recall at k.
        distance: ``"euclidean"`` or ``"cosine"``.
        working_memory: Bytes for the blocks that are in work at a time, beyond the rows, their labels and
            indices; ``None``: 128 MiB, and 4 GiB on a GPU, of which the search takes what it needs. On a CPU more
            saves little time where a query has few relevant rows, and some where it has thousands.
        store_dtype: Precision in which rows are kept between updates, for example ``torch.float16`` to halve their
            memory; ``None`` keeps the precision in which they come.
        engine: ``None`` is exact. :class:`Faiss`, for millions of rows, compares each query with some of them: the
            values are those of the neighbours that it finds.

    Shapes:
        embeddings (N, D), labels (N,) integer, indices (N,) integer, is_query (N,) bool; results are float32 scalars.

    Raises:
        ValueError: For rows or columns that do not fit, NaN or infinity (on the CPU in ``update``, else in
            ``compute``), indices or ``is_query`` given only sometimes, one index with two labels, ``compute`` before
            any update, or no query with a relevant row.

    Reference:
        Musgrave, Belongie, Lim: A Metric Learning Reality Check, 2020, arXiv:2003.08505 (MAP@R, R-precision).

    Example:
        >>> metric = EmbeddingRetrieval(k=(1, 2))
        >>> metric.update(torch.tensor([[0.0], [1.0], [3.0], [3.5]]), torch.tensor([0, 1, 0, 1]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'recall_at_1': 0.0, 'recall_at_2': 0.5, 'map_at_r': 0.0, 'r_precision': 0.0}
    """

    higher_is_better: bool = True
    is_differentiable: bool = False
    _floats = ("embeddings",)
    _integers = ("labels", "indices", "queries")

    embeddings: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]
    queries: list[Tensor]

    def __init__(
        self,
        k: int | Sequence[int] = (1,),
        distance: Literal["euclidean", "cosine"] = "euclidean",
        working_memory: int | None = None,
        store_dtype: torch.dtype | None = None,
        engine: Faiss | None = None,
    ) -> None:
        super().__init__()
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k or any(not isinstance(n, int) or n < 1 for n in self.k) or len(set(self.k)) < len(self.k):
            raise ValueError(f"k must be one or several different integers of at least 1, got {k!r}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f'distance must be "euclidean" or "cosine", got {distance!r}')
        if working_memory is not None and (not isinstance(working_memory, int) or working_memory < 1):
            raise ValueError(f"working_memory must be a whole number of bytes, at least 1, got {working_memory!r}")
        if store_dtype is not None and not store_dtype.is_floating_point:
            raise ValueError(f"store_dtype must be a floating dtype, got {store_dtype}")
        if engine is not None and not isinstance(engine, Faiss):
            raise ValueError(f"engine must be None (exact) or Faiss(), got {engine!r}")
        self.distance, self.working_memory, self.store_dtype = distance, working_memory, store_dtype
        self.engine = engine
        self.left_out = 0

    def update(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, is_query: Tensor | None = None
    ) -> None:
        """Add N rows.

        Args:
            embeddings: (N, D), floating point.
            labels: (N,) class of each row.
            indices: (N,) row of each sample in its data set.
            is_query: (N,) bool, marks the rows that ask; the others are the gallery.
        """
        if self.engine:
            self.engine.refuse_ranks(self.process_group)
        rows = checked_rows(embeddings, self.store_dtype, self.embeddings, "embeddings")
        columns = [checked_column(labels, len(rows), "labels")]
        same_as_before(indices is not None, self.indices, bool(self.labels), "indices")
        same_as_before(is_query is not None, self.queries, bool(self.labels), "is_query")
        if indices is not None:
            columns.append(checked_column(indices, len(rows), "indices"))
        if is_query is not None:
            columns.append(checked_column(is_query, len(rows), "is_query", boolean=True))
        self.embeddings.append(rows)
        self.labels.append(columns[0])
        if indices is not None:
            self.indices.append(columns[1])
        if is_query is not None:
            self.queries.append(columns[-1])

    def compute(self) -> dict[str, Tensor]:
        """Search, and average over queries; every process must call it."""
        device = self.embeddings[0].device if self.embeddings else self.device
        with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            totals, one = self._totals(device)
        names = (*(f"recall_at_{k}" for k in self.k), "map_at_r", "r_precision")
        return dict(zip(names, (totals[1:].double() / (totals[0] * one)).float(), strict=True))

    def _totals(self, device: torch.device) -> tuple[Tensor, int]:
        """Over all queries of all ranks: see :meth:`_Search.sums`; and what stands for 1 there."""
        if self.engine:
            self.engine.refuse_ranks(self.process_group)
        rows = self._joined("embeddings")
        held = agree((rows,), (bool(self.indices), bool(self.queries)), device, self.process_group)
        (rows,), (has_indices, has_queries) = held.rows, held.optional
        labels = self._everyones("labels", held.counts, device)
        indices = self._everyones("indices", held.counts, device) if has_indices else None
        asks = self._everyones("queries", held.counts, device).bool() if has_queries else None

        kept = torch.ones_like(labels, dtype=torch.bool)
        if indices is not None:
            sample = indices if asks is None else 2 * indices + asks  # a sample may both ask and be in the gallery
            refuse_two_labels(sample, indices, labels)
            kept = first_of_each(sample)
        in_gallery = kept if asks is None else kept & ~asks
        asking = kept if asks is None else kept & asks
        position = in_gallery.cumsum(0) - 1 if asks is None else torch.full_like(labels, -1)
        relevant = _class_sizes(labels[in_gallery], labels) - (1 if asks is None else 0)
        found = asking & (relevant > 0)
        self.left_out = int(asking.sum() - found.sum())
        if not bool(found.any()):
            raise ValueError(
                f"none of {int(asking.sum())} queries has a row of its class among {int(in_gallery.sum())} gallery rows"
            )
        # the order that decides ties, and the label at each place in it
        keys = (torch.arange(len(labels), device=device) if indices is None else indices)[in_gallery]
        places = places_of(keys)

        rank, _ = rank_and_size(self.process_group)
        mine = slice(sum(held.counts[:rank]), sum(held.counts[: rank + 1]))
        room = Room(self.working_memory or _WORKING_MEMORY[rows.is_cuda], rows.shape[1])
        gallery = Gallery(rows[in_gallery[mine]], places, self.distance == "cosine", room, self.process_group)
        search = _Search(
            rows=rows,
            labels=labels[mine],
            relevant=relevant[mine],
            position=position[mine],
            gallery=gallery,
            label_at=torch.empty_like(keys).index_put_((places,), labels[in_gallery]),
            widest=min(max(int(relevant[found].max()), *self.k), len(keys) - (1 if asks is None else 0)),
            k=self.k,
            one=2 ** min(52, 62 - len(labels).bit_length()),
        )
        queries = torch.nonzero(found[mine])[:, 0]
        totals = search.approximate(self.engine, queries) if self.engine else search.totals(queries)
        return sum_over_ranks(totals, self.process_group), search.one


@dataclass(frozen=True)
class _Search:
    """The search of one rank for its queries, which may need several tours of the gallery.

    Attributes:
        rows, labels, relevant, position: Local rows; their labels; how many relevant rows the gallery has for each;
            where in the gallery each is itself, or -1.
        gallery, label_at: The gallery, and the label at each place of the order that decides ties.
        widest: How many neighbours the neediest query of any rank needs.
        k: Of recall at k.
        one: What stands for 1 in sums, which are of integers so that they do not depend on any order: as large as sums
            over all rows allow.
    """

    rows: Tensor
    labels: Tensor
    relevant: Tensor
    position: Tensor
    gallery: Gallery
    label_at: Tensor
    widest: int
    k: Sequence[int]
    one: int

    def totals(self, queries: Tensor) -> Tensor:
        """:meth:`sums` of queries, given as local row numbers."""
        total = torch.zeros(len(self.k) + 3, dtype=torch.int64, device=queries.device)
        frame = self.gallery.frame()
        hopeless = [queries[:0]]
        for tour in self._tours(queries):
            unsure = []
            # among many neighbours most are too close for float32
            dtype = torch.float32 if self.widest < _MANY else torch.float64
            for query, scores, places in self._found(tour, self.widest + _SLACK, dtype, frame):
                relevant, count = self._relevance(query, scores, places), self.relevant[query]
                points = self.gallery.points(self.rows[query], asking=True)
                lengths = ((points - frame[0]) * frame[1]).norm(dim=1)
                needed = count.clamp(min=max(self.k)).clamp(max=self.widest)
                calls = close_calls(scores, relevant, needed, lengths, len(frame[0]))
                total += self.sums(relevant[calls.settled, : self.widest], count[calls.settled])
                hopeless.append(query[calls.endless])
                rest = ~calls.settled & ~calls.endless
                unsure.append((query[rest], places[rest], relevant[rest], calls.chain[rest], calls.open[rest]))
            query, places, relevant, chain, open_ = (torch.cat(column) for column in zip(*unsure, strict=True))
            order = self._settle(query, places, chain, open_)
            total += self.sums(relevant.gather(1, order)[:, : self.widest], self.relevant[query])
        for tour in self._tours(torch.cat(hopeless)):
            for query, scores, places in self._found(tour, self.widest, torch.float64, None):
                total += self.sums(self._relevance(query, scores, places), self.relevant[query])
        return total

    def approximate(self, engine: Faiss, queries: Tensor) -> Tensor:
        """:meth:`sums` of queries, with the neighbours that an engine finds."""
        total = torch.zeros(len(self.k) + 3, dtype=torch.int64, device=queries.device)
        for query, scores, places in engine.search(self.gallery, self.rows, self.position, queries, self.widest):
            total += self.sums(self._relevance(query, scores, places), self.relevant[query])
        return total

    def sums(self, relevant: Tensor, count: Tensor) -> Tensor:
        """Sums over queries of ones, and in units of ``one``: of recall at each k, average precision, R-precision.

        ``relevant`` (Q, C) says which neighbours share the class, nearest first; ``count`` (Q,) how many there are in
        all.
        """
        place = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        inside = relevant & (place <= count[:, None])
        precision = torch.where(inside, inside.cumsum(dim=1).double() / place, 0.0)
        found = [relevant[:, :n].any(dim=1).sum() * self.one for n in self.k]
        average = self._whole(self._whole(precision).sum(dim=1).double() / self.one / count)
        return torch.stack(
            [count.new_tensor(len(count)), *found, average.sum(), self._whole(inside.sum(dim=1).double() / count).sum()]
        )

    def _whole(self, x: Tensor) -> Tensor:
        return (x * self.one).round().long()

    def _tours(self, queries: Tensor) -> Iterator[Tensor]:
        """Queries in bunches whose neighbours fit into memory, equally many bunches on every rank."""
        bunch = self.gallery.room.queries(self.widest + _SLACK)
        longest = max(row_counts(len(queries), queries.device, self.gallery.group))
        return (queries[start : start + bunch] for start in range(0, longest, bunch))

    def _found(
        self, tour: Tensor, width: int, dtype: torch.dtype, frame: tuple[Tensor, float] | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        start = 0
        for nearest in self.gallery.search(self.rows[tour], self.position[tour], width, dtype, frame):
            query = tour[start : start + nearest.queries]
            start += len(query)
            yield query, *nearest.in_order()

    def _relevance(self, query: Tensor, scores: Tensor, places: Tensor) -> Tensor:
        same = self.label_at[places.clamp(max=len(self.label_at) - 1)] == self.labels[query, None]
        return same & scores.isfinite()

    def _settle(self, query: Tensor, places: Tensor, chain: Tensor, open_: Tensor) -> Tensor:
        """The true order of the neighbours: by chain, in open chains by exact distance, then by place."""
        row, column = torch.nonzero(open_, as_tuple=True)
        exact = torch.zeros_like(places, dtype=torch.float64)
        exact[row, column] = self.gallery.between(self.rows, query[row], places[row, column])
        order = places.argsort(dim=1)
        for key in (exact, chain):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        return order


def _class_sizes(gallery: Tensor, labels: Tensor) -> Tensor:
    """How many rows of the gallery carry each of the labels."""
    classes, sizes = torch.unique(gallery, return_counts=True)
    if len(classes) == 0:
        return torch.zeros_like(labels)
    at = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[at] == labels, sizes[at], 0)
