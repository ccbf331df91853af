"""Exact nearest rows at the price of a float32 product: rough scores, proven order, and exact distances where needed.

A product of float32 rows has a known worst-case error. Where two neighbours of a query are further apart than that,
their order is certain; the few other pairs are measured again by differences in float64, which depend on the two rows
alone. So the result does not depend on block sizes, the number of processes or the library behind the product.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels import native
from lightning_rkd.metrics._blocks import BlockSizes
from lightning_rkd.metrics._rows import as_points, exact_distances
from lightning_rkd.utils.distributed import broadcast_blocks, sum_over_ranks

LAST = torch.iinfo(torch.int64).max
Frame = tuple[Tensor, float]
"""Origin and scale of a frame in which float32 loses nothing to an offset or a magnitude."""


class Nearest:
    """The ``width`` smallest pairs (score, place) of each query among all that were offered.

    In CPU memory the kernel ``functional._kernels.scan`` does the work where numba is installed; the pairs are the same
    without it.
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
        """Add the scores (queries, n) of n gallery rows and their places (n,)."""
        if self._kept:
            self._kept.offer(scores, places)
            return
        bound = self.worst
        if not self._started and self.width <= scores.shape[1]:  # no bound yet
            bound = scores.topk(self.width, dim=1, largest=False, sorted=False).values.amax(dim=1)
        self._started = True
        # few entries pass after the first block: this comparison, which reads each block once, is most of the work
        row, column = _hits(scores <= bound[:, None])
        score, place = scores[row, column], places[column]
        if len(row) > self.scores.numel():  # many ties, most of which come too late to stay
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
        if bool(((scores <= kth).sum(dim=1) > self.width).any()):  # ties at the border: the lower places stay
            rank = torch.where(scores < kth, -1, torch.where(scores == kth, places, LAST))
            best = rank.topk(self.width, dim=1, largest=False, sorted=False).indices
            values = scores.gather(1, best)
        self.scores, self.places, self.worst = values, places.gather(1, best), kth[:, 0]
        self.worst_place = torch.where(values == kth, self.places, -1).amax(dim=1)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Scores and places, (queries, width) each, nearest first, ties by place."""
        if self._kept:
            return self._kept.in_order()  # type: ignore[no-any-return]
        if len(self.scores):
            self._merge()
        places, by_place = self.places.sort(dim=1)
        scores, by_score = self.scores.gather(1, by_place).sort(dim=1, stable=True)
        return scores, places.gather(1, by_score)


def _hits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask.nonzero(as_tuple=True)`` for rare hits, comparing eight entries at once."""
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
    """The gallery rows of this rank, in the precision they are stored in, and the places of those of all ranks."""

    rows: Tensor
    places: Tensor  # of the gallery rows of all ranks, in rank order, in the order that decides ties
    cosine: bool
    sizes: BlockSizes
    group: Any = None

    def frame(self) -> Frame:
        """Mean of all gallery points, and one over their root mean square distance from it."""
        mean = torch.zeros(self.rows.shape[1] + self.cosine, dtype=torch.float64, device=self.rows.device)
        for rows in torch.split(self.rows, self.sizes.rows):
            mean += self.points(rows).sum(dim=0)
        mean = sum_over_ranks(mean, self.group) / len(self.places)
        square = mean.new_zeros(())
        for rows in torch.split(self.rows, self.sizes.rows):
            square += (self.points(rows) - mean).square().sum()
        spread = float(sum_over_ranks(square, self.group)) / len(self.places)
        return mean, spread**-0.5 if spread > 0 else 1.0

    def points(self, rows: Tensor, frame: Frame | None = None, queries: bool = False) -> Tensor:
        """Rows as float64 points to compare, in a frame.

        For the cosine a zero row of the gallery gets a coordinate of its own, so that its cosine with all queries is 0.
        """
        x = as_points(rows, self.cosine)
        if self.cosine:
            lost = torch.zeros_like(x[:, :1]) if queries else (x == 0).all(dim=1, keepdim=True)
            x = torch.cat([x, lost], dim=1)
        return x if frame is None else (x - frame[0]) * frame[1]

    def search(
        self, queries: Tensor, own: Tensor, width: int, dtype: torch.dtype, frame: Frame | None
    ) -> list[Nearest]:
        """Neighbours of consecutive blocks of the local queries in the whole gallery; every rank must take part.

        ``own`` is the position in the gallery of each query, which it must not find, or -1. Scores are
        ``|g|^2 - 2 q.g`` of points in the frame, or exact distances without one.
        """
        lines, columns = self.sizes.scores(width)
        lines, columns = min(lines, max(1, len(queries))), min(columns, len(self.places))
        left = []
        for rows in torch.split(queries, lines):
            x = self.points(rows, frame, queries=True)
            left.append(
                x if frame is None else torch.cat([-2 * x.to(dtype), x.new_ones(len(x), 1, dtype=dtype)], dim=1)
            )
        nearest = [Nearest(len(x), width, dtype, queries.device) for x in left]
        buffer = torch.empty(lines * columns if frame else 0, dtype=dtype, device=queries.device)
        for start, (rows,) in broadcast_blocks((self.rows,), columns, self.group):
            stop, right = start + len(rows), self.points(rows, frame)
            if frame is not None:
                right = right.to(dtype)
                right = torch.cat([right, right.double().square().sum(dim=1, keepdim=True).to(dtype)], dim=1)
            for x, position, found in zip(left, torch.split(own, lines), nearest, strict=True):
                if frame is None:
                    scores = exact_distances(x, right)
                else:
                    scores = buffer[: len(x) * len(rows)].view(len(x), len(rows))
                    torch.mm(x, right.T, out=scores)
                (row,) = torch.nonzero((position >= start) & (position < stop), as_tuple=True)
                scores[row, position[row] - start] = torch.inf
                found.offer(scores, self.places[start:stop])
        return nearest

    def measure_pairs(self, rows: Tensor, which: Tensor, places: Tensor) -> Tensor:
        """Exact distances between ``rows[which]`` and the gallery rows at ``places``; every rank must take part."""
        positions = self.places.argsort()[places]
        found = torch.zeros(len(which), dtype=torch.float64, device=rows.device)
        for start, (block,) in broadcast_blocks((self.rows,), self.sizes.rows, self.group):
            (here,) = torch.nonzero((positions >= start) & (positions < start + len(block)), as_tuple=True)
            for part in torch.split(here, max(1, self.sizes.entries // (8 * rows.shape[1]))) if len(here) else ():
                left = self.points(rows[which[part]], queries=True)
                right = self.points(block[positions[part] - start])
                found[part] = exact_distances(left[:, None], right[:, None])[:, 0, 0]
        return found


def find_close_calls(
    scores: Tensor, relevant: Tensor, needed: Tensor, lengths: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Find the neighbours whose order rounding may have changed.

    The score :math:`|g|^2 - 2 q \cdot g` of points in their frame is computed with an error of at most
    :math:`\varepsilon = (D + 8) u (2 |q| + d)^2` for rows within distance :math:`d` of the query, u being the unit
    roundoff, in whatever order the product sums. Two scores more than :math:`2 \varepsilon` apart are in their true
    order; a chain of closer ones may be permuted, which matters only if it holds both relevant and irrelevant rows.

    ``scores`` (Q, C) ascend, ``needed`` (Q,) first places count, ``lengths`` (Q,) are the queries' norms. Returns (Q,)
    masks of settled queries, whose sequence of relevant and irrelevant rows is proven, and of unresolved ones, whose
    uncertain part may reach beyond the neighbours kept; (Q, C) numbers of chains, and a mask of chains with both.
    """
    u = torch.finfo(scores.dtype).eps / 2
    last = scores.gather(1, (needed - 1)[:, None])[:, 0].double()
    reach = 2 * lengths + (last + lengths.square()).clamp_min(0).sqrt()
    error = (columns + 8) * u * reach.square() * 1.01 + torch.finfo(scores.dtype).tiny
    close = scores.diff(dim=1).double() <= 2 * error[:, None]
    mixed = relevant[:, 1:] != relevant[:, :-1]
    # pair j joins places j and j + 1; it counts among the needed places, and as far as close pairs continue from there
    pair = torch.arange(close.shape[1], device=scores.device)
    counts = (close | (pair < needed[:, None] - 1)).cumprod(dim=1).bool()
    decisive = counts & close & mixed
    chain = torch.nn.functional.pad((~close).cumsum(dim=1), (1, 0))
    marks = torch.zeros_like(chain).scatter_add_(1, chain[:, 1:], decisive.long())
    unresolved = counts[:, -1]
    return ~decisive.any(dim=1) & ~unresolved, unresolved, chain, marks.gather(1, chain) > 0
