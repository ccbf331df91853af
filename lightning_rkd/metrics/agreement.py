"""Agreement of two geometries: do student and teacher see the same neighbours, order of distances, and angles?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._nearest import distances, full_precision
from lightning_rkd.metrics._rows import (
    RowMetric,
    agree,
    checked_rows,
    first_of_each,
    places_of,
    points,
)
from lightning_rkd.utils.distributed import (
    Shard,
    blocks_over_ranks,
    fetch_rows,
    rank_and_size,
    row_counts,
    sum_over_ranks,
)

_ENTRIES = 2**21  # float64 entries per working array: 16 MiB
_BLOCK = 1024  # rows that travel together
_TRIPLETS = 256  # measured together, whatever the number of processes, so that the sum is the same to the last bit


class RelationalAgreement(RowMetric):
    r"""How far a student's relations between samples agree with the teacher's.

    Three views of two embeddings :math:`s, t` of the same N samples, none of which minds that their widths, scales or
    orientations differ:

    - ``neighbour_overlap_at_k``: the share of an anchor's k nearest samples that both have in common, averaged over
      anchors; 0 to 1.
    - ``distance_correlation``: Spearman's rank correlation, between the two, of an anchor's distances to all other
      samples, averaged over anchors; -1 to 1.
    - ``angle_gap``: :math:`|\angle_s(i, j, k) - \angle_t(i, j, k)|` at vertex j, in degrees, averaged over random
      triplets; 0 to 180, lower is better.

    What counts, precisely: distances are Euclidean, between rows as given, computed from differences in float64. Equal
    distances share their average rank; among the neighbours the lower index (without indices the earlier row, rank 0
    first) goes first. An anchor for which all distances are equal on one side (a collapsed network) correlates
    by 0. An angle with a leg of length 0 counts as 90 degrees (cosine 0, as in the angle loss). With ``indices`` a
    sample that comes twice counts once, and rows are sorted by index, so the same anchors and triplets are drawn
    whatever the number of processes and the order of the updates.

    Cost: :math:`O(A N (D + \log N))` for A anchors. Under several processes each keeps its own rows; in ``compute()``,
    which all must enter, blocks of rows pass by every process, each measures the anchors that are among its own rows
    and its share of the triplets, so none ever holds all embeddings. Values are the same for any number of processes.

    Args:
        k: Neighbours compared.
        triplets: Random triplets of distinct samples for the angle gap.
        max_anchors: Shard of the other two; a random subset where there are more samples; ``None`` takes all.
        distance: ``"euclidean"``, or ``"cosine"``, which first scales all rows to length 1.
        seed: Of anchors and triplets.

    Shapes:
        student (N, D_s), teacher (N, D_t), indices (N,) integer; results are float32 scalars.

    Raises:
        ValueError: For rows that do not fit, NaN or infinity, indices given only sometimes, ``compute`` before any
            update, or fewer than max(k + 1, 3) samples.

    Reference:
        Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv:1904.05068 (distances and angles as what a
        student should keep).

    Example:
        >>> metric = RelationalAgreement(k=1)
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [4.0, 5.0]])
        >>> metric.update(2 * teacher.flip(1) + 7, teacher)  # the same shape, elsewhere
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'neighbour_overlap_at_1': 1.0, 'distance_correlation': 1.0, 'angle_gap': 0.0}
    """

    is_differentiable: bool = False
    _floats = ("student", "teacher")
    _integers = ("indices",)

    student: list[Tensor]
    teacher: list[Tensor]
    indices: list[Tensor]

    def __init__(
        self,
        k: int = 10,
        triplets: int = 10_000,
        max_anchors: int | None = 2_000,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("k", k), ("triplets", triplets), ("max_anchors", max_anchors)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f'distance must be "euclidean" or "cosine", got {distance!r}')
        self.k, self.triplets, self.max_anchors, self.distance, self.seed = k, triplets, max_anchors, distance, seed

    def update(self, student: Tensor, teacher: Tensor, indices: Tensor | None = None) -> None:
        """Add what both networks show for N samples.

        Args:
            student: (N, D_s), floating point.
            teacher: (N, D_t), floating point.
            indices: (N,) row of each sample in its data set.
        """
        s = checked_rows(student, None, self.student, "student embeddings")
        t = checked_rows(teacher, None, self.teacher, "teacher embeddings")
        if len(s) != len(t):
            raise ValueError(f"student has {len(s)} rows, but teacher has {len(t)}")
        self._add_indices(indices, len(s), bool(self.student))
        self.student.append(s)
        self.teacher.append(t)

    def compute(self) -> dict[str, Tensor]:
        """Compare; every process must call it."""
        device = self.student[0].device if self.student else self.device
        with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            means = self._means(device)
        names = (f"neighbour_overlap_at_{self.k}", "distance_correlation", "angle_gap")
        return dict(zip(names, means.float(), strict=True))

    def _means(self, device: torch.device) -> Tensor:
        rows = self._rows(device)
        n = len(rows.places)
        if n < max(self.k + 1, 3):
            raise ValueError(f"{n} different samples are too few: k = {self.k} needs at least {max(self.k + 1, 3)}")
        generator = torch.Generator().manual_seed(self.seed)
        triplets = draw_triplets(n, self.triplets, generator).to(device)
        anchors = torch.randperm(n, generator=generator)[: self.max_anchors].sort().values.to(device)
        overlap, correlation = rows.compared(anchors, self.k).sum(dim=1)
        gap = rows.angle_gaps(triplets).sum()
        return torch.stack([overlap / (len(anchors) * self.k), correlation / len(anchors), gap / self.triplets])

    def _rows(self, device: torch.device) -> _Rows:
        sides = (self._joined("student"), self._joined("teacher"))
        held = agree(sides, (bool(self.indices),), device, self.process_group)
        rank, _ = rank_and_size(self.process_group)
        first = sum(held.counts[:rank])
        mine = slice(first, first + held.counts[rank])
        student, teacher = held.rows
        keys = torch.arange(sum(held.counts), device=device)
        if held.optional[0]:
            keys = self._everyones("indices", held.counts, device)
            kept = first_of_each(keys)
            student, teacher, keys = student[kept[mine]], teacher[kept[mine]], keys[kept]
            first = int(kept[:first].sum())
        return _Rows((student, teacher), places_of(keys), first, self.distance == "cosine", self.process_group)


@dataclass(frozen=True)
class _Rows:
    """The samples of one rank, and where those of all ranks stand.

    Attributes:
        sides: Local rows of student and teacher, each sample once.
        places: Place of every sample, of all ranks in rank order, in the order in which anchors and triplets count.
        first: Number of the first local sample in rank order.
        cosine: Whether to compare directions.
        group: Process group.
    """

    sides: tuple[Tensor, Tensor]
    places: Tensor
    first: int
    cosine: bool
    group: Any

    def compared(self, anchors: Tensor, k: int) -> Tensor:
        """(2, A): of every anchor, given by place, the neighbours in common and the rank correlation.

        Each rank measures the anchors among its own samples; those of the others add zeros.
        """
        values = torch.zeros(2, len(anchors), dtype=torch.float64, device=anchors.device)
        here = self.places[self.first : self.first + len(self.sides[0])]
        number = torch.searchsorted(anchors, here).clamp(max=len(anchors) - 1)
        mine = torch.nonzero(anchors[number] == here)[:, 0]
        n, width = len(self.places), sum(side.shape[1] for side in self.sides)
        # as many at a time as fit into as much memory as the rows take, or else into a little
        bunch = max(1, _ENTRIES // n, width // (4 * rank_and_size(self.group)[1]))
        for start in range(0, max(row_counts(len(mine), mine.device, self.group)), bunch):
            asking = mine[start : start + bunch]
            student, teacher = self._distances(asking, here[asking])
            few = max(1, _ENTRIES // n)
            for a in range(0, len(asking), few):
                values[:, number[asking[a : a + few]]] = _compared(student[a : a + few], teacher[a : a + few], k)
        return sum_over_ranks(values, self.group)

    def _distances(self, asking: Tensor, at: Tensor) -> list[Tensor]:
        """(A, N) for each side, in the order of places; an anchor's to itself is -1: it comes first and alone."""
        anchors = [points(side[asking], self.cosine) for side in self.sides]
        found = [a.new_empty(len(asking), len(self.places)) for a in anchors]
        for start, blocks in blocks_over_ranks(self.sides, _BLOCK, self.group):
            columns = self.places[start : start + len(blocks[0])]
            for side, anchor, block in zip(found, anchors, blocks, strict=True):
                side[:, columns] = distances(anchor, points(block, self.cosine))
        return [side.scatter_(1, at[:, None], -1.0) for side in found]

    def angle_gaps(self, triplets: Tensor) -> Tensor:
        """Sums of the angle gaps of (3, M) triplets of places, one for every few triplets.

        Each rank measures its share; those of the others add zeros.
        """
        number = self.places.argsort()
        few = torch.split(number[triplets], _TRIPLETS, dim=1)
        sums = torch.zeros(len(few), dtype=torch.float64, device=triplets.device)
        share = Shard(self.group)
        first, stop = share.range(len(few))
        size = rank_and_size(self.group)[1]
        bunch = max(1, len(self.places) // (size * 12 * _TRIPLETS))  # fetches a quarter of what a rank holds
        for start in range(0, -(-len(few) // size), bunch):
            bunches = range(first + start, min(first + start + bunch, stop))
            wanted = torch.cat([few[b].flatten() for b in bunches] or [number[:0]])
            fetched = [torch.split(x, 3 * _TRIPLETS) for x in fetch_rows(self.sides, wanted, _BLOCK, self.group)]
            for b, *sides in zip(bunches, *fetched, strict=False):
                student, teacher = (angles(*points(x, self.cosine).chunk(3)) for x in sides)
                sums[b] = (student - teacher).abs().sum()
        return share.sum(sums)


def draw_triplets(n: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` ordered triplets (i, j, k) of distinct numbers below n, uniformly, as (3, count).

    Example:
        >>> draw_triplets(3, 2, torch.Generator().manual_seed(0)).sort(dim=0).values.tolist()
        [[0, 0], [1, 1], [2, 2]]
    """
    i, j, k = (torch.randint(n - taken, (count,), generator=generator) for taken in range(3))
    j = j + (j >= i)  # skip what is taken
    k = k + (k >= torch.minimum(i, j))
    return torch.stack([i, j, k + (k >= torch.maximum(i, j))])


def angles(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """Angle at j between the legs to i and to k, rows of (M, D), in degrees (M,); 90 where a leg has length 0.

    Example:
        >>> angles(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]))
        tensor([45.])
    """
    a, b = (torch.nn.functional.normalize(leg, dim=1, eps=torch.finfo(leg.dtype).tiny) for leg in (i - j, k - j))
    angle = torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)))  # accurate near 0 and 180 too
    bare = (i == j).all(dim=1) | (k == j).all(dim=1)
    return torch.where(bare, 90.0, angle)


def average_ranks(sorted_values: Tensor) -> Tensor:
    """Ranks from 0 of each row's ascending values; equal values share the mean of their ranks.

    Example:
        >>> average_ranks(torch.tensor([[1.0, 2.0, 2.0, 5.0]]))
        tensor([[0.0000, 1.5000, 1.5000, 3.0000]], dtype=torch.float64)
    """
    place = torch.arange(sorted_values.shape[1], device=sorted_values.device).expand_as(sorted_values)
    step = sorted_values.diff(dim=1) != 0
    edge = step.new_ones(len(step), 1)
    first = torch.where(torch.cat([edge, step], dim=1), place, 0).cummax(dim=1).values
    last = torch.where(torch.cat([step, edge], dim=1), place, len(place[0])).flip(1).cummin(dim=1).values.flip(1)
    return (first + last).double() / 2


def _compared(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """(2, A): of every anchor the neighbours in common and the rank correlation, from (A, N) distances."""
    centre = student.shape[1] / 2  # mean of the ranks 1 to N - 1, rank 0 being the anchor itself
    near, ranks = [], []
    for side in (student, teacher):
        values, order = side.sort(dim=1, stable=True)
        rank = (average_ranks(values) - centre).index_fill_(1, order.new_zeros(1), 0.0)
        ranks.append(torch.empty_like(rank).scatter_(1, order, rank))
        near.append(torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, 1 : k + 1], True))
    s, t = ranks
    spread = (s.square().sum(dim=1) * t.square().sum(dim=1)).sqrt()
    correlation = torch.where(spread > 0, (s * t).sum(dim=1) / spread, 0.0)
    return torch.stack([(near[0] & near[1]).sum(dim=1).double(), correlation])
