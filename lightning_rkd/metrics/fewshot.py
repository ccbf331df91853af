"""Few-shot accuracy: queries classified by the mean of a few samples of each class, over random episodes."""

from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.metrics._rows import RowMetric, as_points, exact_distances, rank_keys
from lightning_rkd.utils.distributed import Shard, fetch_rows, rank_and_size, sum_over_ranks

_BLOCK = 1024  # rows of a broadcast block


class FewShotAccuracy(RowMetric):
    r"""Accuracy of the nearest prototype, averaged over random episodes, with a 95 % confidence interval.

    An episode draws ``ways`` classes and of each ``shots`` support samples and ``queries`` others, all without
    replacement. A query q belongs to the class whose prototype is nearest,

    .. math:: \hat y_q = \arg\min_k \lVert x_q - c_k \rVert^2, \qquad c_k = \frac1{|S_k|} \sum_{i \in S_k} x_i,

    and the accuracy :math:`a_e` of an episode is the share of its queries with :math:`\hat y_q = y_q`. The names of the
    results hold ways and shots, so that one evaluation can use several of these metrics:

    - ``few_shot_accuracy_5_way_1_shot``: the mean :math:`\bar a` over episodes;
    - ``few_shot_accuracy_5_way_1_shot_ci95``: half the width of its interval, :math:`1.96\, s / \sqrt{E}` with s the
      standard deviation of :math:`a_e` over the E episodes (E - 1 in its denominator). It covers the draw of episodes
      only, not the seeds of a training.

    Rows are used as given; ``"cosine"`` scales rows, and then prototypes, to unit norm. Distances come from differences
    in float64. Among prototypes at equal distance the one drawn first wins, so that a constant embedding scores
    1 / ways. With ``indices`` a sample that comes twice (the padding of a distributed sampler) counts once, and samples
    are sorted by index before the draw: the episodes then depend on indices, labels and ``seed`` alone, not on the
    network, the number of processes or the order of updates, so that two networks can be compared episode by episode.

    Under several processes each keeps its own rows; in ``compute()``, which every process must call, each scores its
    shard of the episodes and fetches the rows of a few at a time. Values are the same for any number of processes.

    Args:
        ways: Number of classes of an episode.
        shots: Number of samples of a class that make its prototype.
        queries: Number of samples of a class to classify.
        episodes: Number of episodes, at least 2.
        distance: ``"euclidean"`` or ``"cosine"``.
        seed: Seed of the episodes.
        working_memory: Bytes for the rows of the episodes that are computed at a time.
        store_dtype: Precision in which rows are kept between updates; ``None`` keeps the precision of the input.
        value: Name of the one value that ``compute`` returns, as a tensor, for ``self.log(name, metric)`` and
            ``MetricTracker.best_metric``; ``None`` returns all values by name.

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
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
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
        value: str | None = None,
    ) -> None:
        self.ways, self.shots, self.queries, self.episodes = ways, shots, queries, episodes
        super().__init__(distance, store_dtype, value)
        self.seed, self.working_memory = seed, working_memory
        for name, least in {"ways": 2, "shots": 1, "queries": 1, "episodes": 2, "working_memory": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def update(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Add N rows, their classes, and the row of each sample in its data set."""
        self._add({"embeddings": embeddings}, labels=labels, indices=indices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values."""
        name = f"few_shot_accuracy_{self.ways}_way_{self.shots}_shot"
        return (name, f"{name}_ci95")

    def _evaluate(self, device: torch.device) -> Tensor:
        accuracy = self._count_correct(device).double() / (self.ways * self.queries)
        return torch.stack([accuracy.mean(), 1.96 * accuracy.std() / self.episodes**0.5])

    def _count_correct(self, device: torch.device) -> Tensor:
        """(E,) correctly classified queries of each episode, on every rank."""
        samples, group = self._exchange(device), self.process_group
        number = rank_keys(samples.keys).argsort()  # of the sample at each place, in rank order
        labels = samples.columns["labels"][number]
        drawn = draw_episodes(labels, self.ways, self.shots + self.queries, self.episodes, self.seed)
        drawn = number[drawn.to(device)]
        first, stop = Shard(group).range(self.episodes)
        size = rank_and_size(group)[1]
        many = max(1, self.working_memory // (3 * 8 * drawn[0].numel() * samples.rows[0].shape[1]))
        correct = torch.zeros(self.episodes, dtype=torch.int64, device=device)
        for start in range(0, -(-self.episodes // size), many):  # as many fetches on every rank
            part = range(min(first + start, stop), min(first + start + many, stop))
            wanted = drawn[part.start : part.stop]
            (fetched,) = fetch_rows(samples.rows, wanted.flatten(), _BLOCK, group)
            for episode, x in zip(part, fetched.reshape(*wanted.shape, -1), strict=True):
                correct[episode] = count_correct(x, self.shots, self.distance == "cosine")
        return sum_over_ranks(correct, group)


def draw_episodes(labels: Tensor, ways: int, samples: int, episodes: int, seed: int) -> Tensor:
    """Draw E episodes without replacement, as (E, ways, samples) places in ``labels``."""
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
        return torch.randperm(n, generator=generator)[:count].tolist()

    drawn = [members[c][some(len(members[c]), samples)] for _ in range(episodes) for c in some(len(classes), ways)]
    return torch.stack(drawn).view(episodes, ways, samples)


def count_correct(rows: Tensor, shots: int, cosine: bool = False) -> Tensor:
    """Queries nearest to the prototype of their class, in an episode (W, shots + queries, D) with the support first."""
    ways, samples, _ = rows.shape
    x = as_points(rows.flatten(0, 1), cosine).view(ways, samples, -1)
    prototypes = x[:, 0].clone()
    for shot in range(1, shots):  # one by one: the same sums on every machine
        prototypes += x[:, shot]
    prototypes = as_points(prototypes / shots, cosine)
    far = exact_distances(x[:, shots:].flatten(0, 1), prototypes)
    way = torch.arange(ways, device=rows.device)
    nearest = torch.where(far == far.amin(dim=1, keepdim=True), way, ways).amin(dim=1)
    return (nearest == way.repeat_interleave(samples - shots)).sum()
