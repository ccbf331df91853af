"""Few-shot accuracy: queries classified by the mean of a few samples of each class, over many drawn episodes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._nearest import distances, full_precision
from lightning_rkd.metrics._rows import (
    RowMetric,
    agree,
    checked_column,
    checked_rows,
    first_of_each,
    places_of,
    points,
    refuse_two_labels,
)
from lightning_rkd.utils.distributed import Shard, fetch_rows, rank_and_size, sum_over_ranks

_BLOCK = 1024  # rows that travel together


class FewShotAccuracy(RowMetric):
    r"""Accuracy of the nearest prototype, averaged over random episodes, with a 95 % confidence interval.

    An episode draws ``ways`` classes and of each ``shots`` support samples and ``queries`` others, all without
    replacement. A query q belongs to the class whose prototype is nearest,

    .. math:: \hat y_q = \arg\min_k \lVert x_q - c_k \rVert^2, \qquad c_k = \frac1{|S_k|} \sum_{i \in S_k} x_i,

    and the accuracy :math:`a_e` of an episode is the share of its queries of which that is true. Returned, with the
    ways and shots in their names so that several of these metrics can stand beside one another:

    - ``few_shot_accuracy_5_way_1_shot``: the mean :math:`\bar a` over episodes;
    - ``few_shot_accuracy_5_way_1_shot_ci95``: half the width of its interval, :math:`1.96\, s / \sqrt{E}` with s the
      standard deviation of :math:`a_e` over the E episodes (E - 1 in its denominator). It tells of the draw of
      episodes alone, not of the seeds of a training.

    What counts, precisely: rows are used as given; ``"cosine"`` scales rows, and then prototypes, to length 1.
    Distances come from differences in float64. Among prototypes at equal distance the one drawn first wins, so that
    an embedding that shows all samples alike scores 1 / ways. With ``indices`` a sample that comes twice (the padding
    of a distributed sampler) counts once, and samples are sorted by index before any are drawn; the episodes then
    depend on indices, labels and ``seed`` alone, not on the network, the number of processes or the order of updates,
    so that two networks can be compared episode by episode.

    Calling the metric only updates it. Under several processes each keeps its own rows; in ``compute()``, which all
    must enter, each scores its share of the episodes and fetches the rows of a few at a time. Values are the same for
    any number of processes.

    Args:
        ways: Classes of an episode.
        shots: Samples of a class that make its prototype.
        queries: Samples of a class that are classified.
        episodes: Episodes, at least 2.
        distance: ``"euclidean"`` or ``"cosine"``.
        seed: Of the episodes.
        working_memory: Bytes for the rows that are in work at a time.
        store_dtype: Precision in which rows are kept between updates; ``None`` keeps that in which they come.

    Shapes:
        embeddings (N, D), labels (N,) integer, indices (N,) integer; results are float32 scalars.

    Raises:
        ValueError: For rows or columns that do not fit, NaN or infinity, indices given only sometimes, one index with
            two labels, ``compute`` before any update, fewer classes than ``ways``, or classes with fewer than
            ``shots + queries`` samples, which the message names.

    Reference:
        Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175.

    Example:
        >>> metric = FewShotAccuracy(ways=2, shots=1, queries=1, episodes=100)
        >>> metric.update(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'few_shot_accuracy_2_way_1_shot': 1.0, 'few_shot_accuracy_2_way_1_shot_ci95': 0.0}
    """

    higher_is_better: bool = True
    is_differentiable: bool = False
    _floats = ("embeddings",)
    _integers = ("labels", "indices")

    embeddings: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        episodes: int = 600,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        seed: int = 0,
        working_memory: int = 128 * 2**20,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        least = {"ways": 2, "shots": 1, "queries": 1, "episodes": 2, "working_memory": 1}
        given = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes}
        for name, value in {**given, "working_memory": working_memory}.items():
            if not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name} must be a whole number of at least {least[name]}, got {value!r}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f'distance must be "euclidean" or "cosine", got {distance!r}')
        if store_dtype is not None and not store_dtype.is_floating_point:
            raise ValueError(f"store_dtype must be a floating dtype, got {store_dtype}")
        self.ways, self.shots, self.queries, self.episodes = ways, shots, queries, episodes
        self.distance, self.seed = distance, seed
        self.working_memory, self.store_dtype = working_memory, store_dtype

    def update(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Add N rows.

        Args:
            embeddings: (N, D), floating point.
            labels: (N,) class of each row.
            indices: (N,) row of each sample in its data set.
        """
        rows = checked_rows(embeddings, self.store_dtype, self.embeddings, "embeddings")
        classes = checked_column(labels, len(rows), "labels")
        self._add_indices(indices, len(rows), bool(self.labels))
        self.embeddings.append(rows)
        self.labels.append(classes)

    def compute(self) -> dict[str, Tensor]:
        """Draw the episodes, classify, and average; every process must call it."""
        device = self.embeddings[0].device if self.embeddings else self.device
        with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            accuracy = self._correct(device).double() / (self.ways * self.queries)
        name = f"few_shot_accuracy_{self.ways}_way_{self.shots}_shot"
        half = 1.96 * accuracy.std() / self.episodes**0.5
        return {name: accuracy.mean().float(), f"{name}_ci95": half.float()}

    def _correct(self, device: torch.device) -> Tensor:
        """(E,) how many queries of each episode are classified correctly, on every rank."""
        held = agree((self._joined("embeddings"),), (bool(self.indices),), device, self.process_group)
        rank, _ = rank_and_size(self.process_group)
        mine = slice(sum(held.counts[:rank]), sum(held.counts[: rank + 1]))
        (rows,) = held.rows
        labels = self._everyones("labels", held.counts, device)
        keys = torch.arange(len(labels), device=device)
        if held.optional[0]:
            keys = self._everyones("indices", held.counts, device)
            refuse_two_labels(keys, keys, labels)
            kept = first_of_each(keys)
            rows, labels, keys = rows[kept[mine]], labels[kept], keys[kept]
        number = places_of(keys).argsort()  # of the sample at each place, counted in rank order
        drawn = draw_episodes(labels[number], self.ways, self.shots + self.queries, self.episodes, self.seed)
        drawn = number[drawn.to(device)]

        share = Shard(self.process_group)
        first, stop = share.range(self.episodes)
        size = rank_and_size(self.process_group)[1]
        bunch = max(1, self.working_memory // (3 * 8 * drawn[0].numel() * rows.shape[1]))
        correct = torch.zeros(self.episodes, dtype=torch.int64, device=device)
        for start in range(0, -(-self.episodes // size), bunch):  # equally many fetches on every rank
            some = range(min(first + start, stop), min(first + start + bunch, stop))
            wanted = drawn[some.start : some.stop]
            (fetched,) = fetch_rows((rows,), wanted.flatten(), _BLOCK, self.process_group)
            for episode, x in zip(some, fetched.reshape(*wanted.shape, -1), strict=True):
                correct[episode] = correct_queries(x, self.shots, self.distance == "cosine")
        return sum_over_ranks(correct, self.process_group)


def draw_episodes(labels: Tensor, ways: int, samples: int, episodes: int, seed: int) -> Tensor:
    """Which samples each of E episodes holds, as (E, ways, samples) places in ``labels``, none twice in an episode.

    Args:
        labels: (N,) classes.
        ways: Classes of an episode.
        samples: Samples of a class.
        episodes: E.
        seed: Of the draw.

    Raises:
        ValueError: Fewer classes than ``ways``, or classes with fewer samples than ``samples``.

    Example:
        >>> draw_episodes(torch.tensor([7, 8, 7, 8]), ways=2, samples=2, episodes=1, seed=0).sort().values.tolist()
        [[[0, 2], [1, 3]]]
    """
    order = labels.cpu().argsort(stable=True)
    classes, sizes = torch.unique(labels.cpu(), return_counts=True)
    if len(classes) < ways:
        raise ValueError(f"episodes of {ways} ways need at least {ways} classes, and there are {len(classes)}")
    small = [f"{c} ({n})" for c, n in zip(classes.tolist(), sizes.tolist(), strict=True) if n < samples]
    if small:
        more = f" and {len(small) - 10} more" if len(small) > 10 else ""
        raise ValueError(
            f"episodes draw shots + queries = {samples} samples of a class, and these classes have fewer: "
            f"{', '.join(small[:10])}{more}; lower queries, or leave those classes out"
        )
    members = torch.split(order, sizes.tolist())
    generator = torch.Generator().manual_seed(seed)

    def some(n: int, count: int) -> list[int]:
        drawn: list[int] = torch.randperm(n, generator=generator)[:count].tolist()
        return drawn

    return torch.stack(
        [
            torch.stack([members[c][some(len(members[c]), samples)] for c in some(len(classes), ways)])
            for _ in range(episodes)
        ]
    )


def correct_queries(rows: Tensor, shots: int, cosine: bool = False) -> Tensor:
    """How many queries of an episode lie nearest to the prototype of their class.

    Shapes: (W, shots + queries, D), the support first -> scalar, integer.

    Example:
        >>> correct_queries(torch.tensor([[[0.0], [1.0], [9.0]], [[5.0], [6.0], [4.0]]]), shots=1)  # 9 lies near 5
        tensor(3)
    """
    ways, samples, _ = rows.shape
    x = points(rows.flatten(0, 1), cosine).view(ways, samples, -1)
    prototypes = x[:, 0].clone()
    for shot in range(1, shots):  # one by one: the same sums on every machine
        prototypes += x[:, shot]
    prototypes = points(prototypes / shots, cosine)
    far = distances(x[:, shots:].flatten(0, 1), prototypes)
    way = torch.arange(ways, device=rows.device)
    nearest = torch.where(far == far.amin(dim=1, keepdim=True), way, ways).amin(dim=1)
    return (nearest == way.repeat_interleave(samples - shots)).sum()
