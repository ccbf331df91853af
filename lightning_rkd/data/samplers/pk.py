"""P-by-K batches: P classes, K samples of each, the same on one device as on many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

from lightning_rkd.utils.distributed import rank_and_size


class Draw(int):
    """An index with the epoch it was drawn in, so that a data set can augment by (epoch, index) alone.

    Example:
        >>> draw = Draw(7, epoch=3)
        >>> draw, draw.epoch, [10, 20, 30, 40, 50, 60, 70, 80][draw]
        (7, 3, 80)
    """

    epoch: int

    def __new__(cls, index: int, epoch: int = 0) -> Draw:
        """Create the index."""
        draw = super().__new__(cls, index)
        draw.epoch = epoch
        return draw


class PKBatchSampler(Sampler[list[int]]):
    r"""Batches of P classes with K samples each, for metric learning; pass it as ``DataLoader(batch_sampler=...)``.

    Classes and samples are dealt like cards: all classes once in random order before any comes again, all samples of
    a class once before any comes again, and no class twice in a batch. A class with fewer than K samples repeats
    them, as evenly as possible.

    The order depends on ``(seed, epoch)`` alone. With W devices step t takes the next :math:`W P` classes of one
    shared permutation, of which each rank takes P: the batches of W devices together are those of one device with
    :math:`W P` classes, in equally many steps. Lightning must not insert its own sampler:
    ``Trainer(use_distributed_sampler=False)``.

    Args:
        labels: Class of every sample, N integers.
        classes_per_batch: P, classes per batch and device.
        samples_per_class: K, samples of each class in a batch.
        seed: Not negative; the same on all ranks.
        batches_per_epoch: Batches per epoch and device; by default :math:`\lfloor N / (P K W) \rfloor`, at least 1.
        rank: This process among ``size``; read from the process group at iteration when ``None``.
        size: Number of processes W.

    Attributes:
        epoch: The epoch whose order the next iteration follows.
        first_batch: The batch the next iteration begins with: 0, unless :meth:`load_state_dict` restored a position.

    Example:
        >>> labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        >>> sampler = PKBatchSampler(labels, classes_per_batch=2, samples_per_class=3)
        >>> batches = [[labels[i] for i in batch] for batch in sampler]
        >>> [len(set(batch)) for batch in batches], sorted(sum(batches, []))
        ([2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor | npt.NDArray[np.integer],
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
        batches_per_epoch: int | None = None,
        *,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if values.ndim != 1 or len(values) == 0 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(
                f"labels must be N > 0 integers, one per sample; got {values.dtype} of shape {tuple(values.shape)}"
            )
        for name, number in {
            "classes_per_batch": classes_per_batch,
            "samples_per_class": samples_per_class,
            "batches_per_epoch": 1 if batches_per_epoch is None else batches_per_epoch,
        }.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if (rank is None) != (size is None):
            raise ValueError("give both rank and size, or neither")
        if rank is not None and size is not None and not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, {size}), got {rank}")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self._place = None if rank is None or size is None else (rank, size)
        order = np.argsort(values, kind="stable")
        _, first = np.unique(values[order], return_index=True)
        self._samples = len(values)
        self._rows = np.split(order, first[1:])
        self.epoch = self.first_batch = self._next_batch = 0
        self._check_size(self._rank_and_size()[1])

    @property
    def sampler(self) -> PKBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on ``batch_sampler.sampler`` and nowhere else."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. A position that :meth:`load_state_dict` restored is kept if the epoch is the same."""
        if epoch != self.epoch:
            self.first_batch = self._next_batch = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Epoch and next batch, as plain numbers.

        Loader workers fetch ahead of the training loop, and this counts what was fetched; the ``state_dict`` of
        :class:`~lightning_rkd.data.resumable_loader.ResumableLoader` counts what was delivered.
        """
        return {"epoch": self.epoch, "first_batch": self._next_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin in the middle of an epoch; the ones after it begin at its start again."""
        self.epoch, self.first_batch = state["epoch"], state["first_batch"]
        self._next_batch = self.first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, on every rank."""
        if self.batches_per_epoch is not None:
            return self.batches_per_epoch
        _, size = self._rank_and_size()
        return max(1, self._samples // (self.classes_per_batch * self.samples_per_class * size))

    def __iter__(self) -> Iterator[list[int]]:
        rank, size = self._rank_and_size()
        self._check_size(size)
        first, self.first_batch, epoch = self.first_batch, 0, self.epoch
        mine = range(rank * self.classes_per_batch, (rank + 1) * self.classes_per_batch)
        classes = _deal(len(self._rows), self.classes_per_batch * size, (self.seed, epoch, 0))
        hands: dict[int, Iterator[list[int]]] = {}
        for step in range(len(self)):
            batch: list[int] = []
            for place, c in enumerate(next(classes)):
                if c not in hands:
                    hands[c] = _deal(len(self._rows[c]), self.samples_per_class, (self.seed, epoch, 1, c))
                hand = next(hands[c])  # of the other ranks' classes too, for they may come here later
                if place in mine:
                    batch += [Draw(int(self._rows[c][i]), epoch) for i in hand]
            if step >= first:
                self._next_batch = step + 1
                yield batch

    def _rank_and_size(self) -> tuple[int, int]:
        return self._place if self._place is not None else rank_and_size()

    def _check_size(self, size: int) -> None:
        needed = self.classes_per_batch * size
        if len(self._rows) < needed:
            raise ValueError(
                f"classes_per_batch={self.classes_per_batch} on {size} device(s) needs at least {needed} classes, and "
                f"the labels hold {len(self._rows)}: lower classes_per_batch"
            )


def _deal(cards: int, hand: int, seed: tuple[int, ...]) -> Iterator[list[int]]:
    """Deal hands from shuffled decks for ever, without repeats inside a hand while ``hand <= cards``."""
    rng = np.random.default_rng(seed)
    left: list[int] = []
    while True:
        while len(left) < hand:
            deck = [int(card) for card in rng.permutation(cards)]
            held = set(left)  # these are dealt next, so in the new deck they come last
            left += [card for card in deck if card not in held] + [card for card in deck if card in held]
        yield left[:hand]
        left = left[hand:]
