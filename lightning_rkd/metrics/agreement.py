"""Agreement of two geometries: neighbours, order of distances, and angles in student and teacher."""

from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._rows import RowMetric, Samples, as_points, exact_distances, rank_keys
from lightning_rkd.utils.distributed import (
    Shard,
    broadcast_blocks,
    fetch_rows,
    gather_row_counts,
    rank_and_size,
    sum_over_ranks,
)

_ENTRIES = 2**21  # float64 entries per working array: 16 MiB
_BLOCK = 1024  # rows of a broadcast block
_TRIPLETS = 256  # measured together for any number of processes, so that the sum is the same to the last bit


class RelationalAgreement(RowMetric):
    r"""Agreement of a student's relations between samples with the teacher's.

    Three measures of two embeddings :math:`s, t` of the same N samples, which may differ in width, scale and
    orientation:

    - ``neighbour_overlap_at_k``: the share of an anchor's k nearest samples that both have in common, averaged over
      anchors; 0 to 1.
    - ``distance_correlation``: Spearman's rank correlation, between the two, of an anchor's distances to all other
      samples, averaged over anchors; -1 to 1.
    - ``angle_gap``: :math:`|\angle_s(i, j, k) - \angle_t(i, j, k)|` at vertex j, in degrees, averaged over random
      triplets; 0 to 180, lower is better.

    Distances are computed from differences in float64, between rows as given. Equal distances share their average
    rank; among equally near neighbours the lower index (without indices the earlier row, rank 0 first) goes first. The
    correlation of an anchor is 0 if all its distances are equal in one network (which has collapsed). An angle with a
    leg of length 0 counts as 90 degrees (cosine 0, as in the angle loss). With ``indices`` a sample that comes twice
    counts once, and samples are sorted by index, so that anchors and triplets depend neither on the number of processes
    nor on the order of the updates.

    The cost is :math:`O(A N (D + \log N))` for A anchors. Under several processes each keeps its own rows;
    ``compute()``, which every process must call, broadcasts rows block by block. Each process evaluates the anchors
    among its own rows and its shard of the triplets, so that none ever holds all embeddings. Values are the same for
    any number of processes.

    Args:
        k: Number of neighbours to compare.
        triplets: Number of random triplets of distinct samples for the angle gap.
        max_anchors: Number of anchors for the other two measures, drawn at random; ``None`` takes all samples.
        distance: ``"euclidean"``, or ``"cosine"``, which first scales all rows to unit norm.
        seed: Seed of anchors and triplets.
        value: Name of the one value that ``compute`` returns, as a tensor, for ``self.log(name, metric)`` and
            ``MetricTracker.best_metric``; ``None`` returns all values by name.

    Shapes:
        student (N, D_s), teacher (N, D_t), indices (N,) integer; results are float32 scalars.

    Raises:
        ValueError: For rows that do not fit, NaN or infinity, indices given only sometimes, ``compute`` before any
            update, or fewer than max(k + 1, 3) samples.

    Reference:
        Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv:1904.05068 (distances and angles).

    Example:
        >>> metric = RelationalAgreement(k=1)
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [4.0, 5.0]])
        >>> metric.update(2 * teacher.flip(1) + 7, teacher)  # mirrored, scaled and moved
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'neighbour_overlap_at_1': 1.0, 'distance_correlation': 1.0, 'angle_gap': 0.0}
    """

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
        value: str | None = None,
    ) -> None:
        self.k = k
        super().__init__(distance, value=value)
        for name, count in (("k", k), ("triplets", triplets), ("max_anchors", max_anchors)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.triplets, self.max_anchors, self.seed = triplets, max_anchors, seed

    def update(self, student: Tensor, teacher: Tensor, indices: Tensor | None = None) -> None:
        """Add the embeddings of N samples by both networks, and the row of each sample in its data set."""
        self._add({"student": student, "teacher": teacher}, indices=indices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values."""
        return (f"neighbour_overlap_at_{self.k}", "distance_correlation", "angle_gap")

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """True for overlap and correlation, false for the angle gap, ``None`` for all three."""
        return None if self.value is None else self.value != "angle_gap"

    def _evaluate(self, device: torch.device) -> Tensor:
        samples = self._exchange(device)
        places = rank_keys(samples.keys)
        n = len(places)
        if n < max(self.k + 1, 3):
            raise ValueError(f"{n} different samples are too few: k = {self.k} needs at least {max(self.k + 1, 3)}")
        generator = torch.Generator().manual_seed(self.seed)
        triplets = draw_triplets(n, self.triplets, generator).to(device)
        anchors = torch.randperm(n, generator=generator)[: self.max_anchors].sort().values.to(device)
        overlap, correlation = self._compare_anchors(samples, places, anchors).sum(dim=1)
        gap = self._angle_gaps(samples, places.argsort()[triplets]).sum()
        return torch.stack([overlap / (len(anchors) * self.k), correlation / len(anchors), gap / self.triplets])

    def _compare_anchors(self, samples: Samples, places: Tensor, anchors: Tensor) -> Tensor:
        """(2, A) common neighbours and rank correlations of anchors, given by place; each rank computes its own."""
        values = torch.zeros(2, len(anchors), dtype=torch.float64, device=anchors.device)
        here, rows = places[samples.own], samples.rows
        number = torch.searchsorted(anchors, here).clamp(max=len(anchors) - 1)
        own = torch.nonzero(anchors[number] == here)[:, 0]
        # as many anchors per pass as fit into the memory of the rows, or into a little
        few = max(1, _ENTRIES // len(places))
        many = max(few, sum(x.shape[1] for x in rows) // (4 * rank_and_size(self.process_group)[1]))
        for start in range(0, max(gather_row_counts(len(own), own.device, self.process_group)), many):
            part = own[start : start + many]
            student, teacher = self._distances(samples, places, part)
            for a in range(0, len(part), few):
                compared = compare_distances(student[a : a + few], teacher[a : a + few], self.k)
                values[:, number[part[a : a + few]]] = compared
        return sum_over_ranks(values, self.process_group)

    def _distances(self, samples: Samples, places: Tensor, anchors: Tensor) -> list[Tensor]:
        """(A, N) distances of local anchors in both networks, by place; -1 to the anchor itself, so it comes first."""
        cosine, rows = self.distance == "cosine", samples.rows
        left = [as_points(x[anchors], cosine) for x in rows]
        found = [x.new_empty(len(anchors), len(places)) for x in left]
        for start, blocks in broadcast_blocks(rows, _BLOCK, self.process_group):
            columns = places[start : start + len(blocks[0])]
            for far, x, block in zip(found, left, blocks, strict=True):
                far[:, columns] = exact_distances(x, as_points(block, cosine))
        return [far.scatter_(1, places[samples.own][anchors, None], -1.0) for far in found]

    def _angle_gaps(self, samples: Samples, triplets: Tensor) -> Tensor:
        """Sums of the angle gaps of (3, M) triplets of sample numbers, one per group; each rank computes its shard."""
        groups = torch.split(triplets, _TRIPLETS, dim=1)
        sums = torch.zeros(len(groups), dtype=torch.float64, device=triplets.device)
        shard, size = Shard(self.process_group), rank_and_size(self.process_group)[1]
        first, stop = shard.range(len(groups))
        many = max(1, len(samples.keys) // (size * 12 * _TRIPLETS))  # fetches a quarter of the rows of a rank
        for start in range(0, -(-len(groups) // size), many):
            part = range(first + start, min(first + start + many, stop))
            wanted = torch.cat([groups[g].flatten() for g in part] or [triplets[0, :0]])
            fetched = fetch_rows(samples.rows, wanted, _BLOCK, self.process_group)
            for g, *both in zip(part, *(torch.split(x, 3 * _TRIPLETS) for x in fetched), strict=False):
                student, teacher = (angles(*as_points(x, self.distance == "cosine").chunk(3)) for x in both)
                sums[g] = (student - teacher).abs().sum()
        return shard.sum(sums)


def draw_triplets(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniformly random ordered triplets (i, j, k) of distinct numbers below n, as (3, count)."""
    i, j, k = (torch.randint(n - taken, (count,), generator=generator) for taken in range(3))
    j = j + (j >= i)  # skip what is taken
    k = k + (k >= torch.minimum(i, j))
    return torch.stack([i, j, k + (k >= torch.maximum(i, j))])


def angles(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """Angles in degrees (M,) at j between the legs to i and k, rows of (M, D); 90 where a leg has length 0."""
    a, b = (torch.nn.functional.normalize(leg, dim=1, eps=torch.finfo(leg.dtype).tiny) for leg in (i - j, k - j))
    angle = torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)))  # accurate near 0 and 180 too
    bare = (i == j).all(dim=1) | (k == j).all(dim=1)
    return torch.where(bare, 90.0, angle)


def average_ranks(sorted_values: Tensor) -> Tensor:
    """Ranks from 0 of the ascending values of each row; equal values share their mean rank."""
    place = torch.arange(sorted_values.shape[1], device=sorted_values.device).expand_as(sorted_values)
    step = sorted_values.diff(dim=1) != 0
    edge = step.new_ones(len(step), 1)
    first = torch.where(torch.cat([edge, step], dim=1), place, 0).cummax(dim=1).values
    last = torch.where(torch.cat([step, edge], dim=1), place, len(place[0])).flip(1).cummin(dim=1).values.flip(1)
    return (first + last).double() / 2


def compare_distances(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """(2, A) common neighbours and rank correlations of anchors, from (A, N) distances of both networks."""
    centre = student.shape[1] / 2  # mean of the ranks 1 to N - 1; the anchor itself has rank 0
    near, ranks = [], []
    for far in (student, teacher):
        values, order = far.sort(dim=1, stable=True)
        rank = (average_ranks(values) - centre).index_fill_(1, order.new_zeros(1), 0.0)
        ranks.append(torch.empty_like(rank).scatter_(1, order, rank))
        near.append(torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, 1 : k + 1], True))
    s, t = ranks
    spread = (s.square().sum(dim=1) * t.square().sum(dim=1)).sqrt()
    correlation = torch.where(spread > 0, (s * t).sum(dim=1) / spread, 0.0)
    return torch.stack([(near[0] & near[1]).sum(dim=1).double(), correlation])
