"""Episodes for prototypical training."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_rkd.data.samplers.pk import PKBatchSampler


def episode_sampler(
    labels: Sequence[int] | Tensor | npt.NDArray[np.integer],
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int | None = None,
    seed: int = 0,
) -> PKBatchSampler:
    """Batches that are N-way K-shot episodes, for ``DataLoader(batch_sampler=...)`` and ``PrototypicalLoss(shots)``.

    An episode is a P-by-K batch of P = ``ways`` classes and K = ``shots + queries`` samples of each: the first
    ``shots`` of a class make its prototype, the others are classified. So a data module draws episodes with
    ``classes_per_batch=ways``, ``samples_per_class=shots + queries`` and ``batches_per_epoch=episodes``. Order,
    resuming and many devices are those of :class:`~lightning_rkd.data.PKBatchSampler`: W devices of ``ways`` classes
    train on episodes of W ``ways`` classes.

    A class with fewer samples than ``shots + queries`` is refused, as a repeated sample could be query and support at
    once.

    Args:
        labels: Class of every sample, N integers.
        ways: Classes of an episode, on each device.
        shots: Samples of a class that make its prototype.
        queries: Samples of a class that are classified.
        episodes: Episodes per epoch; by default they hold about N samples.
        seed: Not negative; the same on all ranks.

    Reference:
        Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175.

    Example:
        >>> labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
        >>> for episode in episode_sampler(labels, ways=2, shots=1, queries=2, episodes=2):
        ...     print([labels[i] for i in episode])
        [2, 2, 2, 0, 0, 0]
        [1, 1, 1, 2, 2, 2]
    """
    for name, number in {"shots": shots, "queries": queries}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    sampler = PKBatchSampler(labels, ways, shots + queries, seed, episodes)
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    classes, sizes = np.unique(values, return_counts=True)
    small = [f"{c} ({n})" for c, n in zip(classes, sizes, strict=True) if n < shots + queries]
    if small:
        raise ValueError(
            f"episodes draw shots + queries = {shots + queries} samples of a class, and these classes have fewer: "
            f"{', '.join(small[:10])}{f' and {len(small) - 10} more' if len(small) > 10 else ''}; lower queries, or "
            "leave those classes out"
        )
    return sampler
