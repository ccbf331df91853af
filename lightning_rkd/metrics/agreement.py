"""Agreement of two geometries: do student and teacher see the same neighbours, order of distances, and angles?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.distributed import Anchors, gather_rows
from lightning_rkd.metrics._nearest import distances, full_precision
from lightning_rkd.metrics._rows import (
    RowMetric,
    agree,
    checked_column,
    checked_rows,
    first_of_each,
    points,
    same_as_before,
)

_ENTRIES = 2**21  # float64 entries per working array: 16 MiB


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

    Cost: :math:`O(A N (D + \log N))` for A anchors. Under several processes ``compute()``, which all must enter,
    gathers the rows of all on each (N (D_s + D_t) numbers), and the anchors and triplets are shared out.

    Args:
        k: Neighbours compared.
        triplets: Random triplets of distinct samples for the angle gap.
        max_anchors: Anchors of the other two; a random subset where there are more samples; ``None`` takes all.
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
        same_as_before(indices is not None, self.indices, bool(self.student), "indices")
        if indices is not None:
            self.indices.append(checked_column(indices, len(s), "indices"))
        self.student.append(s)
        self.teacher.append(t)

    def compute(self) -> dict[str, Tensor]:
        """Compare; every process must call it."""
        device = self.student[0].device if self.student else self.device
        with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            student, teacher = self._everyones_rows(device)
            n = len(student)
            if n < max(self.k + 1, 3):
                raise ValueError(f"{n} different samples are too few: k = {self.k} needs at least {max(self.k + 1, 3)}")
            generator = torch.Generator().manual_seed(self.seed)
            i, j, k = draw_triplets(n, self.triplets, generator).to(device)
            anchors = torch.randperm(n, generator=generator)[: self.max_anchors].sort().values.to(device)
            share = Anchors(self.process_group)
            sums = torch.zeros(3, dtype=torch.float64, device=device)
            first, stop = share.share(len(anchors))
            for block in torch.split(anchors[first:stop], max(1, _ENTRIES // n)):
                sums[:2] += _compared(_distances(student, block), _distances(teacher, block), self.k)
            first, stop = share.share(self.triplets)
            lines = max(1, _ENTRIES // (student.shape[1] + teacher.shape[1]))
            for block in torch.split(torch.arange(first, stop, device=device), lines):
                a, b = (angles(x[i[block]], x[j[block]], x[k[block]]) for x in (student, teacher))
                sums[2] += (a - b).abs().sum()
            overlap, correlation, gap = share.sum(sums).unbind()
            means = (overlap / (len(anchors) * self.k), correlation / len(anchors), gap / self.triplets)
        names = (f"neighbour_overlap_at_{self.k}", "distance_correlation", "angle_gap")
        return {name: value.float() for name, value in zip(names, means, strict=True)}

    def _everyones_rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        sides = (self._joined("student"), self._joined("teacher"))
        held = agree(sides, (bool(self.indices),), device, self.process_group)
        student, teacher = (gather_rows(rows, held.counts, self.process_group) for rows in held.rows)
        if held.optional[0]:
            mine = self._joined("indices")
            mine = torch.empty(0, dtype=torch.int64, device=device) if mine is None else mine
            indices = gather_rows(mine, held.counts, self.process_group)
            kept = torch.nonzero(first_of_each(indices))[:, 0]
            kept = kept[indices[kept].argsort()]
            student, teacher = student[kept], teacher[kept]
        return points(student, self.distance == "cosine"), points(teacher, self.distance == "cosine")


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


def _distances(x: Tensor, anchors: Tensor) -> Tensor:
    """(A, N) distances; an anchor's to itself is -1, so that it comes first and alone."""
    return distances(x[anchors], x).scatter_(1, anchors[:, None], -1.0)


def _compared(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Sums over anchors of the neighbours in common and of the rank correlations, from (A, N) distances."""
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
    return torch.stack([(near[0] & near[1]).sum().double(), correlation.sum()])
