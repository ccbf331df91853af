"""Exact nearest rows at the price of a float32 product: find them roughly, prove the order, repeat only what is open.

A product of float32 rows has a known worst-case error. Where two neighbours of a query are further apart than that,
their order is certain; the few pairs for which it is not are measured again by direct differences in float64, which
depend on the two rows alone. So the result is the same whatever the block size, the number of processes or the
library behind the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels import native
from lightning_rkd.metrics._memory import Room
from lightning_rkd.metrics._rows import points
from lightning_rkd.utils.distributed import blocks_over_ranks, sum_over_ranks

LAST = torch.iinfo(torch.int64).max


class Nearest:
    """The ``width`` smallest pairs (score, place) of each query among all that were offered.

    In CPU memory ``functional._kernels.scan`` finds them, where there is one; they are the same without it.

    Args:
        queries: Number of queries.
        width: How many pairs to keep for each.
        dtype: Of the scores.
        device: Where they live.

    Example:
        >>> nearest = Nearest(1, 2, torch.float32, torch.device("cpu"))
        >>> nearest.offer(torch.tensor([[5.0, 3.0, 3.0]]), torch.tensor([7, 9, 8]))
        >>> nearest.in_order()
        (tensor([[3., 3.]]), tensor([[8, 9]]))
    """

    def __init__(self, queries: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.queries, self.width, self._started = queries, width, False
        scan = native("scan") if device.type == "cpu" else None
        self._kept = scan.Kept(queries, width, dtype) if scan else None
        if self._kept:
            return
        self.scores = torch.full((queries, width), torch.inf, dtype=dtype, device=device)
        self.places = torch.full((queries, width), LAST, device=device)
        self.worst, self.worst_place = self.scores[:, -1].clone(), self.places[:, -1].clone()
        self._waiting = torch.zeros(queries, dtype=torch.int64, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # rows, slots, scores, places

    def offer(self, scores: Tensor, places: Tensor) -> None:
        """Show the queries the scores (queries, n) of n gallery rows and their places (n,)."""
        if self._kept:
            self._kept.offer(scores, places)
            return
        bound = self.worst
        if not self._started and self.width <= scores.shape[1]:  # nothing to hold them against yet
            bound = scores.topk(self.width, dim=1, largest=False, sorted=False).values.amax(dim=1)
        self._started = True
        # few entries pass after the first block: this comparison reads each block once and is most of the work
        row, column = _hits(scores <= bound[:, None])
        score, place = scores[row, column], places[column]
        if len(row) > self.scores.numel():  # a flood of ties, which mostly come too late to stay
            ahead = (score < self.worst[row]) | (place < self.worst_place[row])
            row, score, place = row[ahead], score[ahead], place[ahead]
        count = torch.bincount(row, minlength=len(self.scores))
        slot = torch.arange(len(row), device=row.device) + (self._waiting + count - count.cumsum(0))[row]
        self._waiting += count
        self._pending.append((row, slot, score, place))
        if 2 * sum(len(pending[0]) for pending in self._pending) > self.scores.numel():
            self._merge()

    def _merge(self) -> None:
        size = (len(self.scores), self.width + int(self._waiting.max()))
        scores, places = self.scores.new_full(size, torch.inf), self.places.new_full(size, LAST)
        scores[:, : self.width], places[:, : self.width] = self.scores, self.places
        for row, slot, score, place in self._pending:
            scores[row, self.width + slot], places[row, self.width + slot] = score, place
        self._pending.clear()
        self._waiting.zero_()

        values, best = scores.topk(self.width, dim=1, largest=False, sorted=False)
        kth = values.amax(dim=1, keepdim=True)
        if bool(((scores <= kth).sum(dim=1) > self.width).any()):  # a tie at the border: the lower places stay
            rank = torch.where(scores < kth, -1, torch.where(scores == kth, places, LAST))
            best = rank.topk(self.width, dim=1, largest=False, sorted=False).indices
            values = scores.gather(1, best)
        self.scores, self.places, self.worst = values, places.gather(1, best), kth[:, 0]
        self.worst_place = torch.where(values == kth, self.places, -1).amax(dim=1)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Scores and places, (queries, width) each, nearest first, ties by place."""
        if self._kept:
            scores, places = self._kept.in_order()
            return scores, places
        if len(self.scores):
            self._merge()
        places, by_place = self.places.sort(dim=1)
        scores, by_score = self.scores.gather(1, by_place).sort(dim=1, stable=True)
        return scores, places.gather(1, by_score)


def _hits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask.nonzero(as_tuple=True)`` for rare hits: looks at eight entries at once."""
    columns = mask.shape[1]
    if columns % 8:
        row, column = torch.nonzero(mask, as_tuple=True)
        return row, column
    eight = torch.nonzero(mask.view(torch.int64).view(-1))[:, 0]
    which, bit = torch.nonzero(mask.view(-1, 8)[eight], as_tuple=True)
    flat = eight[which] * 8 + bit
    return flat // columns, flat % columns


@dataclass(frozen=True)
class Gallery:
    """The gallery rows this rank holds, and what all ranks know about the whole of it.

    Args:
        rows: Local rows in the precision they are stored in.
        places: Position of every gallery row (of all ranks, in rank order) in the order that decides ties.
        cosine: Whether to compare directions.
        room: For the blocks in which queries and gallery are compared.
        group: Process group.
    """

    rows: Tensor
    places: Tensor
    cosine: bool
    room: Room
    group: Any = None

    def frame(self) -> tuple[Tensor, float]:
        """The mean of all gallery points, and one over their root mean square distance from it."""
        total = sum_over_ranks(self._sums(0.0)[0], self.group)
        mean = total / len(self.places)
        spread = float(sum_over_ranks(self._sums(mean)[1], self.group)) / len(self.places)
        return mean, spread**-0.5 if spread > 0 else 1.0

    def _sums(self, origin: Tensor | float) -> tuple[Tensor, Tensor]:
        first = torch.zeros(self.rows.shape[1] + self.cosine, dtype=torch.float64, device=self.rows.device)
        second = first.new_zeros(())
        for rows in torch.split(self.rows, self.room.block):
            x = self.points(rows) - origin
            first += x.sum(dim=0)
            second += x.square().sum()
        return first, second

    def points(self, rows: Tensor, asking: bool = False) -> Tensor:
        """Rows as float64 points whose distances are to be compared.

        For the cosine a zero row of the gallery is given a coordinate of its own: its cosine with anything is 0.
        """
        x = points(rows, self.cosine)
        if not self.cosine:
            return x
        lost = torch.zeros_like(x[:, :1]) if asking else (x == 0).all(dim=1, keepdim=True)
        return torch.cat([x, lost], dim=1)

    def search(
        self, queries: Tensor, own: Tensor, width: int, dtype: torch.dtype, frame: tuple[Tensor, float] | None
    ) -> list[Nearest]:
        """One tour of the gallery past the local queries; every rank must take part, even with no query.

        Args:
            queries: Rows that ask.
            own: Position in the gallery of each query itself, which it must not find; -1 where it is not there.
            width: Neighbours to keep.
            dtype: Precision of the products.
            frame: From :meth:`frame`: scores are ``|g|^2 - 2 q.g`` of points in that frame. ``None``: scores are
                distances from direct differences.

        Returns:
            What consecutive blocks of queries found.
        """
        lines, columns = self.room.shape(width)
        lines, columns = min(lines, max(1, len(queries))), min(columns, len(self.places))
        asking = [self._asking(rows, dtype, frame) for rows in torch.split(queries, lines)]
        itself = torch.split(own, lines)
        nearest = [Nearest(len(ask), width, dtype, queries.device) for ask in asking]
        buffer = torch.empty(lines * columns if frame else 0, dtype=dtype, device=queries.device)
        for start, (rows,) in blocks_over_ranks((self.rows,), columns, self.group):
            given, stop = self._given(rows, dtype, frame), start + len(rows)
            for ask, position, found in zip(asking, itself, nearest, strict=True):
                if frame is None:
                    scores = distances(ask, given)
                else:
                    scores = buffer[: len(ask) * len(rows)].view(len(ask), len(rows))
                    torch.mm(ask, given.T, out=scores)
                (row,) = torch.nonzero((position >= start) & (position < stop), as_tuple=True)
                scores[row, position[row] - start] = torch.inf
                found.offer(scores, self.places[start:stop])
        return nearest

    def between(self, rows: Tensor, which: Tensor, places: Tensor) -> Tensor:
        """Distances from direct differences between ``rows[which]`` and the gallery rows at ``places``, (P,) each.

        Another tour, so every rank must take part, even with no pair.
        """
        positions = self.places.argsort()[places]
        found = torch.zeros(len(which), dtype=torch.float64, device=rows.device)
        for start, (block,) in blocks_over_ranks((self.rows,), self.room.block, self.group):
            (here,) = torch.nonzero((positions >= start) & (positions < start + len(block)), as_tuple=True)
            for few in torch.split(here, max(1, self.room.entries // (8 * rows.shape[1]))) if len(here) else ():
                ask = self.points(rows[which[few]], asking=True)
                given = self.points(block[positions[few] - start])
                found[few] = distances(ask[:, None], given[:, None])[:, 0, 0]
        return found

    def _asking(self, rows: Tensor, dtype: torch.dtype, frame: tuple[Tensor, float] | None) -> Tensor:
        x = self.points(rows, asking=True)
        if frame is None:
            return x
        x = ((x - frame[0]) * frame[1]).to(dtype)
        return torch.cat([-2 * x, torch.ones_like(x[:, :1])], dim=1)

    def _given(self, rows: Tensor, dtype: torch.dtype, frame: tuple[Tensor, float] | None) -> Tensor:
        x = self.points(rows)
        if frame is None:
            return x
        x = ((x - frame[0]) * frame[1]).to(dtype)
        return torch.cat([x, x.double().square().sum(dim=1, keepdim=True).to(dtype)], dim=1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (..., n, m) from differences: each depends on its two rows alone, bit for bit."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class CloseCalls:
    """What rounding leaves open in the order of Q queries' neighbours.

    Attributes:
        settled: (Q,) the sequence of relevant and irrelevant rows is proven.
        endless: (Q,) the open part may reach beyond the neighbours kept.
        chain: (Q, C) numbers, ascending, of the chains of neighbours whose order is not proven; between chains it is.
        open: (Q, C) neighbours in a chain that holds both relevant and irrelevant rows.
    """

    settled: Tensor
    endless: Tensor
    chain: Tensor
    open: Tensor


def close_calls(scores: Tensor, relevant: Tensor, needed: Tensor, lengths: Tensor, columns: int) -> CloseCalls:
    r"""Find the neighbours whose order rounding may have changed.

    The score :math:`|g|^2 - 2 q \cdot g` of points in their frame is computed with an error of at most
    :math:`\varepsilon = (D + 8) u (2 |q| + d)^2` for rows within distance :math:`d` of the query, u being the unit
    roundoff, in whatever order the product sums. Two scores more than :math:`2 \varepsilon` apart are in their true
    order; a chain of closer ones may be permuted, which matters only if it holds both relevant and irrelevant rows.

    Args:
        scores: (Q, C) ascending.
        relevant: (Q, C) bool.
        needed: (Q,) how many of the first places count; at least 1, at most the finite scores.
        lengths: (Q,) norm of each query in the frame.
        columns: D, the length of the sums.
    """
    u = torch.finfo(scores.dtype).eps / 2
    last = scores.gather(1, (needed - 1)[:, None])[:, 0].double()
    reach = 2 * lengths + (last + lengths.square()).clamp_min(0).sqrt()
    error = (columns + 8) * u * reach.square() * 1.01 + torch.finfo(scores.dtype).tiny
    close = scores.diff(dim=1).double() <= 2 * error[:, None]
    mixed = relevant[:, 1:] != relevant[:, :-1]
    # pair j joins places j and j + 1; it counts if it lies among the needed, or if close pairs lead on to it from there
    pair = torch.arange(close.shape[1], device=scores.device)
    counts = (close | (pair < needed[:, None] - 1)).cumprod(dim=1).bool()
    telling = counts & close & mixed
    chain = torch.nn.functional.pad((~close).cumsum(dim=1), (1, 0))
    marks = torch.zeros_like(chain).scatter_add_(1, chain[:, 1:], telling.long())
    endless = counts[:, -1]
    return CloseCalls(~telling.any(dim=1) & ~endless, endless, chain, marks.gather(1, chain) > 0)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: no TF32, no bfloat16, whatever the user allowed for training."""
    candidates: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    holders = [c for c in candidates if hasattr(c, "fp32_precision")]  # torch 2.9 and later; before, one global word
    words = [holder.fp32_precision for holder in holders]
    word = "" if holders else torch.get_float32_matmul_precision()
    try:
        for holder in holders:
            holder.fp32_precision = "ieee"
        if word:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for holder, before in zip(holders, words, strict=True):
            holder.fp32_precision = before
        if word:
            torch.set_float32_matmul_precision(word)
