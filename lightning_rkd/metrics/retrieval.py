"""Retrieval by embeddings: recall at k, MAP@R and R-precision, exact unless asked otherwise, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._blocks import BlockSizes
from lightning_rkd.metrics._faiss import Faiss
from lightning_rkd.metrics._nearest import Frame, Gallery, find_close_calls
from lightning_rkd.metrics._rows import RowMetric, Samples, find_keys, rank_keys
from lightning_rkd.utils.distributed import gather_row_counts, sum_over_ranks

_SLACK = 4  # neighbours beyond the needed ones, to detect close calls at the border
_MANY = 256
_WORKING_MEMORY = {False: 128 * 2**20, True: 4 * 2**30}  # on a GPU the overhead of small blocks dominates


@dataclass(frozen=True)
class Candidates:
    """The rows that queries are compared with: rows stay on their rank, integers are known to all."""

    rows: Tensor  # local
    labels: Tensor  # of the rows of all ranks, in rank order
    keys: Tensor  # decide ties
    position: Tensor  # among them of the row that each sample must not find, or -1


class EmbeddingRetrieval(RowMetric):
    r"""Recall at k, mean average precision at R and R-precision of nearest neighbours.

    With :math:`R` the number of gallery rows that share the class of a query, and :math:`y_j` = 1 where its j-th
    nearest gallery row does,

    .. math::
        \text{recall@}k = \max_{j \le k} y_j, \qquad
        \text{R-precision} = \frac1R \sum_{j \le R} y_j, \qquad
        \text{MAP@R} = \frac1R \sum_{j \le R} y_j \, \frac1j \sum_{i \le j} y_i,

    each averaged over the queries. Without ``is_query`` every row is a query and is compared with all other rows;
    with it, the marked rows are the queries and the others are the gallery. :class:`AsymmetricRetrieval` has queries of
    one network and a gallery of another.

    - Rows are used as given. ``"euclidean"`` normalises nothing; ``"cosine"`` compares directions (unit rows rounded
      to float32; a zero row has cosine 0 with everything).
    - Neighbours are ordered by the exact distances between the stored rows: products in float32 find them, and
      wherever rounding could change the result, float64 decides.
    - Ties go to the lower index, or without indices to the earlier row, counting the rows of rank 0 first.
    - A query without any relevant row in the gallery (a class with one sample) is left out of the means;
      ``left_out`` is the number of such queries.
    - With ``indices`` a sample that comes twice (the padding of a distributed sampler) counts once, or once as a query
      and once in the gallery, where the query does not find it. Without indices nothing is removed.

    Under several processes each keeps its own rows; ``compute()``, which every process must call, exchanges labels and
    indices and broadcasts the gallery block by block, so that no process ever holds all embeddings. A process may have
    no rows. Values are the same for any number of processes, any order and grouping of the updates (given indices) and
    any working memory.

    Args:
        k: One k of recall at k, or several.
        distance: ``"euclidean"`` or ``"cosine"``.
        working_memory: Bytes for blocks of the search, beyond the rows, their labels and indices. ``None`` is 128 MiB,
            and up to 4 GiB on a GPU. On a CPU more memory saves little time, except for queries with thousands of
            relevant rows.
        store_dtype: Precision in which rows are kept between updates, for example ``torch.float16`` to halve their
            memory; ``None`` keeps the precision of the input.
        engine: ``None`` searches exactly. :class:`Faiss`, for millions of rows, searches approximately.
        value: Name of the one value that ``compute`` returns, as a tensor, for ``self.log(name, metric)`` and
            ``MetricTracker.best_metric``; ``None`` returns all values by name.

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
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    _floats: tuple[str, ...] = ("embeddings",)
    _integers = ("labels", "indices", "is_query")

    embeddings: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]
    is_query: list[Tensor]

    def __init__(
        self,
        k: int | Sequence[int] = (1,),
        distance: Literal["euclidean", "cosine"] = "euclidean",
        working_memory: int | None = None,
        store_dtype: torch.dtype | None = None,
        engine: Faiss | None = None,
        value: str | None = None,
    ) -> None:
        self.k = (k,) if isinstance(k, int) else tuple(k)
        super().__init__(distance, store_dtype, value)
        if not self.k or any(not isinstance(n, int) or n < 1 for n in self.k) or len(set(self.k)) < len(self.k):
            raise ValueError(f"k must be one or several different integers of at least 1, got {k!r}")
        if working_memory is not None and (not isinstance(working_memory, int) or working_memory < 1):
            raise ValueError(f"working_memory must be a whole number of bytes, at least 1, got {working_memory!r}")
        if engine is not None and not isinstance(engine, Faiss):
            raise ValueError(f"engine must be None (exact) or Faiss(), got {engine!r}")
        self.working_memory, self.engine, self.left_out = working_memory, engine, 0

    def update(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, is_query: Tensor | None = None
    ) -> None:
        """Add N rows.

        Args:
            embeddings: (N, D), floating point.
            labels: (N,) class of each row.
            indices: (N,) row of each sample in its data set.
            is_query: (N,) bool, true for queries; the other rows are the gallery.
        """
        if self.engine:
            self.engine.check_ranks(self.process_group)
        self._add({"embeddings": embeddings}, labels=labels, indices=indices, is_query=is_query)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values."""
        return (*(f"recall_at_{k}" for k in self.k), "map_at_r", "r_precision")

    def _evaluate(self, device: torch.device) -> Tensor:
        totals, one = self._totals(device)
        return totals[1:].double() / (totals[0] * one)

    def _totals(self, device: torch.device) -> tuple[Tensor, int]:
        """Sums over the queries of all ranks, see :meth:`_Search.sum_scores`, and the integer that stands for 1."""
        if self.engine:
            self.engine.check_ranks(self.process_group)
        samples = self._exchange(device)
        rows, labels, own = samples.rows[0], samples.columns["labels"], samples.own
        is_query = samples.columns.get("is_query", torch.ones_like(labels)).bool()
        found = self._find_candidates(samples)
        itself = (found.position >= 0).long()
        relevant = _count_labels(found.labels, labels) - itself
        evaluated = is_query & (relevant > 0)
        self.left_out = int(is_query.sum() - evaluated.sum())
        if not bool(evaluated.any()):
            sizes = f"{int(is_query.sum())} queries has a row of its class among {len(found.keys)} gallery rows"
            raise ValueError(f"none of {sizes}")
        places = rank_keys(found.keys)
        needed = torch.minimum(relevant.clamp(min=max(self.k)), len(places) - itself)
        blocks = BlockSizes(self.working_memory or _WORKING_MEMORY[rows.is_cuda], rows.shape[1])
        search = _Search(
            rows=rows,
            labels=labels[own],
            relevant=relevant[own],
            needed=needed[own],
            position=found.position[own],
            gallery=Gallery(found.rows, places, self.distance == "cosine", blocks, self.process_group),
            label_at=torch.empty_like(places).index_put_((places,), found.labels),
            widest=int(needed[evaluated].max()),
            k=self.k,
            one=2 ** min(52, 62 - len(labels).bit_length()),
        )
        queries = torch.nonzero(evaluated[own])[:, 0]
        totals = search.approximate(self.engine, queries) if self.engine else search.exact(queries)
        return sum_over_ranks(totals, self.process_group), search.one

    def _find_candidates(self, samples: Samples) -> Candidates:
        """The gallery, in which a query does not find the row of its own index."""
        rows, labels, keys = samples.rows[-1], samples.columns["labels"], samples.keys
        if "is_query" not in samples.columns:
            return Candidates(rows, labels, keys, torch.arange(len(labels), device=labels.device))
        inside = samples.columns["is_query"] == 0
        position = find_keys(keys[inside], keys)
        return Candidates(rows[inside[samples.own]], labels[inside], keys[inside], position)


@dataclass(frozen=True)
class _Search:
    """The search of one rank for its queries; rows, labels and so on are local."""

    rows: Tensor
    labels: Tensor
    relevant: Tensor  # number of gallery rows of the class of each row
    needed: Tensor  # number of neighbours of each row that its values depend on
    position: Tensor  # of each row in the gallery, or -1
    gallery: Gallery
    label_at: Tensor  # at each place of the order that decides ties
    widest: int  # largest number of neighbours that a query of any rank needs
    k: Sequence[int]
    one: int  # stands for 1 in the sums, as large as they allow: sums of integers do not depend on their order

    def exact(self, queries: Tensor) -> Tensor:
        """:meth:`sum_scores` of queries, given as local row numbers, by their exact neighbours."""
        total = torch.zeros(len(self.k) + 3, dtype=torch.int64, device=queries.device)
        frame = self.gallery.frame()
        # among many neighbours most are too close for float32
        dtype = torch.float32 if self.widest < _MANY else torch.float64
        unresolved = [queries[:0]]
        for part in self._passes(queries):
            uncertain = []
            for query, scores, places in self._neighbours(part, self.widest + _SLACK, dtype, frame):
                relevant, count = self._relevance(query, scores, places), self.relevant[query]
                lengths = self.gallery.points(self.rows[query], frame, queries=True).norm(dim=1)
                settled, beyond, chain, mixed = find_close_calls(
                    scores, relevant, self.needed[query], lengths, len(frame[0])
                )
                total += self.sum_scores(relevant[settled], count[settled])
                unresolved.append(query[beyond])
                rest = ~settled & ~beyond
                uncertain.append((query[rest], places[rest], relevant[rest], chain[rest], mixed[rest]))
            query, places, relevant, chain, mixed = (torch.cat(column) for column in zip(*uncertain, strict=True))
            order = self._true_order(query, places, chain, mixed)
            total += self.sum_scores(relevant.gather(1, order), self.relevant[query])
        for part in self._passes(torch.cat(unresolved)):
            for query, scores, places in self._neighbours(part, self.widest, torch.float64, None):
                total += self.sum_scores(self._relevance(query, scores, places), self.relevant[query])
        return total

    def approximate(self, engine: Faiss, queries: Tensor) -> Tensor:
        """:meth:`sum_scores` of queries by the neighbours that an engine finds."""
        total = torch.zeros(len(self.k) + 3, dtype=torch.int64, device=queries.device)
        for query, scores, places in engine.search(self.gallery, self.rows, self.position, queries, self.widest):
            total += self.sum_scores(self._relevance(query, scores, places), self.relevant[query])
        return total

    def sum_scores(self, relevant: Tensor, count: Tensor) -> Tensor:
        """Sums over queries: their number, and in units of ``one`` recall at each k, average precision, R-precision.

        ``relevant`` (Q, C) marks the neighbours of the query's class, nearest first; ``count`` (Q,) is the number of
        rows of the class.
        """
        relevant = relevant[:, : self.widest]
        place = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        inside = relevant & (place <= count[:, None])
        precision = torch.where(inside, inside.cumsum(dim=1).double() / place, 0.0)
        recalls = [relevant[:, :n].any(dim=1).sum() * self.one for n in self.k]
        average = self._to_integer(self._to_integer(precision).sum(dim=1).double() / self.one / count).sum()
        r_precision = self._to_integer(inside.sum(dim=1).double() / count).sum()
        return torch.stack([count.new_tensor(len(count)), *recalls, average, r_precision])

    def _to_integer(self, x: Tensor) -> Tensor:
        return (x * self.one).round().long()

    def _passes(self, queries: Tensor) -> Iterator[Tensor]:
        """Queries in parts whose neighbours fit into memory; the same number of parts on every rank."""
        size = self.gallery.sizes.queries(self.widest + _SLACK)
        most = max(gather_row_counts(len(queries), queries.device, self.gallery.group))
        return (queries[start : start + size] for start in range(0, most, size))

    def _neighbours(
        self, queries: Tensor, width: int, dtype: torch.dtype, frame: Frame | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of queries with the scores and places of their neighbours, nearest first."""
        start = 0
        for nearest in self.gallery.search(self.rows[queries], self.position[queries], width, dtype, frame):
            query = queries[start : start + nearest.queries]
            start += len(query)
            yield query, *nearest.in_order()

    def _relevance(self, query: Tensor, scores: Tensor, places: Tensor) -> Tensor:
        same = self.label_at[places.clamp(max=len(self.label_at) - 1)] == self.labels[query, None]
        return same & scores.isfinite()

    def _true_order(self, query: Tensor, places: Tensor, chain: Tensor, mixed: Tensor) -> Tensor:
        """Order of neighbours by chain, in mixed chains by exact distance, then by place."""
        row, column = torch.nonzero(mixed, as_tuple=True)
        exact = torch.zeros_like(places, dtype=torch.float64)
        exact[row, column] = self.gallery.measure_pairs(self.rows, query[row], places[row, column])
        order = places.argsort(dim=1)
        for key in (exact, chain):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        return order


def _count_labels(gallery: Tensor, labels: Tensor) -> Tensor:
    """Number of gallery rows with each of the labels."""
    classes, sizes = torch.unique(gallery, return_counts=True)
    if len(classes) == 0:
        return torch.zeros_like(labels)
    at = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[at] == labels, sizes[at], 0)
