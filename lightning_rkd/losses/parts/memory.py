"""Memories of contrastive losses: one row per training sample, or the rows of the last batches."""

import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.parts.state import StepState

_UNKNOWN = torch.iinfo(torch.int64).min  # the class of a sample that no batch has held yet
_BLOCK = 2**25  # similarities computed at a time


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random number generator that depends on seed and step alone: the same on every rank, and after a resume."""
    mixed = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest()  # the CPU's generator takes 32 bits
    return torch.Generator(device).manual_seed(int.from_bytes(mixed, "big"))


class MemoryBank(StepState):
    r"""One l2-normalised row for every sample of the training set, renewed when a batch holds the sample.

    .. math:: m_i \leftarrow \frac{\mu\, m_i + (1 - \mu)\, x_i}{\lVert \mu\, m_i + (1 - \mu)\, x_i \rVert_2}

    An index that a batch holds several times, as with several views of a sample, is renewed once, with the mean of its
    rows. Rows begin as uniformly random points of the sphere. All randomness comes from ``seed`` and the number of
    updates, so that all ranks hold the same bank, and a loaded bank continues as the saved one would have.

    Args:
        num_samples: M, the size of the training set.
        dim: Width of a row.
        seed: Of the first rows and of the negatives.
        name: Of the loss, for messages.

    Attributes:
        rows: (M, dim), float32 (float64 after ``.double()``).
        labels: (M,), the classes of the samples that a batch has held.
        updates: The number of updates; stays in host memory.

    Example:
        >>> bank = MemoryBank(4, 2)
        >>> bank.update(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), momentum=0.0)
        >>> bank.rows[1]
        tensor([0.7071, 0.7071])
    """

    on_host: ClassVar[frozenset[str]] = frozenset({"updates"})
    rows: Tensor
    labels: Tensor
    updates: Tensor

    def __init__(self, num_samples: int, dim: int, *, seed: int = 0, name: str = "MemoryBank") -> None:
        super().__init__()
        if num_samples < 2 or dim < 1:
            raise ValueError(
                f"{name}: a memory holds a row for each of at least 2 samples, "
                f"got num_samples={num_samples} and dim={dim}; pass the size of the training set"
            )
        self.seed, self.name = seed, name
        rows = torch.randn(num_samples, dim, generator=generator(seed, -1), dtype=torch.float32)
        self.register_buffer("rows", F.normalize(rows, dim=1))
        self.register_buffer("labels", torch.full((num_samples,), _UNKNOWN, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._late: list[tuple[Tensor, Any]] = []

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_late": []}  # events of a device cannot be copied

    def locate(self, indices: Tensor) -> Tensor:
        """Check indices and move them to the bank's device, as int64.

        An index outside the bank is refused at once; on CUDA, so that the host never waits, it is clamped, and refused
        when a later batch is located.
        """
        if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            got = f"{indices.dtype} of shape {tuple(indices.shape)}"
            raise TypeError(f"{self.name}: indices must be integers of shape (N,), got {got}")
        indices = indices.to(self.rows.device, torch.int64)
        bounds = torch.stack(indices.aminmax())
        if not indices.is_cuda:
            self._refuse(bounds)
            return indices
        while self._late and self._late[0][1].query():
            self._refuse(self._late.pop(0)[0])
        host = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(bounds, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._late.append((host, event))
        return indices.clamp(0, len(self) - 1)

    def draw(self, indices: Tensor, count: int, labels: Tensor | None = None) -> Tensor:
        r"""Draw negatives for every sample of a batch, uniformly and with replacement: (N,) -> (N, count), int64.

        Without labels they come from all other samples, with labels, (N,) or soft (N, K), from all samples of other
        classes. The bank knows the class of a sample after its first update; until then its row is a random point of no
        class, a negative for every sample. The draws depend on the seed, the number of updates, and the rank of a
        sample's index among those of the batch, not on the order of the rows.
        """
        size, device = len(self), self.rows.device
        if labels is None:
            order, start, stop = None, indices, indices + 1
        else:
            labels = _classes(labels, device)
            known = self.labels.index_copy(0, indices, labels)
            order = known.argsort(stable=True)  # the samples of a class lie together
            ordered = known[order]
            start, stop = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
        excluded = stop - start
        others = size - excluded
        if device.type == "cpu" and bool((others == 0).any()):
            raise ValueError(
                f"{self.name}: all {size} samples in memory are of one class, so there is no negative to draw; "
                "train on more classes, or leave out the labels where the loss allows it"
            )
        order_of_draws = (indices[:, None] > indices).sum(1)
        drawn = torch.randint(
            2**52, (len(indices), count), generator=generator(self.seed, int(self.updates), device), device=device
        )[order_of_draws]
        drawn = drawn.remainder_(others.clamp(min=1)[:, None])
        drawn += (drawn >= start[:, None]) * excluded[:, None]
        return drawn if order is None else order[drawn]

    def similarities(self, features: Tensor, which: Tensor) -> Tensor:
        r"""Inner products of each feature with its own selection of rows, differentiable in the features.

        .. math:: s_{ik} = \langle x_i, m_{w_{ik}} \rangle

        Gathering the rows would take N x K x dim numbers. All N x M products take less where a data set has fewer than
        K x dim samples, and run at the speed of a matrix product; blocks of samples bound their memory. They are taken
        with a copy of the rows, so that the gradient is right also when the bank is updated before the backward pass.

        Shapes: features (N, dim), which (N, K) -> (N, K).
        """
        rows = self.rows.to(features.dtype, copy=True)
        step = max(1, _BLOCK // len(rows))
        blocks = zip(torch.split(features, step), torch.split(which, step), strict=True)
        return torch.cat([(x @ rows.T).gather(1, w) for x, w in blocks])

    @torch.no_grad()
    def update(self, indices: Tensor, rows: Tensor, momentum: float, labels: Tensor | None = None) -> None:
        """Renew the rows of a batch's samples, and store their classes; call it in training only, after the loss.

        Duplicates count as one sample with the mean of their rows; ``momentum`` is the share of the old row.
        """
        same = indices[:, None] == indices
        weights = same.to(self.rows.dtype)
        means = (weights @ rows.to(self.rows.dtype)) / weights.sum(1, keepdim=True)
        means = means[weights.argmax(1)]  # to the last bit the same for all duplicates
        renewed = momentum * self.rows[indices] + (1 - momentum) * means
        self.rows.index_copy_(0, indices, F.normalize(renewed, dim=1))
        if labels is not None:
            self.labels.index_copy_(0, indices, _classes(labels, self.labels.device))
        self.updates += 1

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return f"num_samples={len(self)}, dim={self.rows.shape[1]}, seed={self.seed}"

    def _refuse(self, bounds: Tensor) -> None:
        low, high = bounds.tolist()
        if low < 0 or high >= len(self):
            raise ValueError(
                f"{self.name}: index {low if low < 0 else high} is outside its memory of {len(self)} samples; "
                "pass num_samples=..., the size of the data set that the indices count"
            )


class Queue(StepState):
    """The rows of the last batches: first in, first out.

    Rows begin as random points of the sphere, as in momentum contrast.

    Args:
        size: The number of rows.
        dim: Width of a row.
        seed: Of the first rows.
        name: Of the loss, for messages.
        setting: Of that loss, the argument that gives the size.

    Attributes:
        rows: (size, dim), in no particular order; float32 (float64 after ``.double()``).
        pushed: The number of rows pushed so far; stays in host memory.

    Example:
        >>> queue = Queue(3, 1)
        >>> for row in range(4):
        ...     queue.push(torch.tensor([[float(row)]]))
        >>> queue.contents().flatten().tolist(), queue.filled
        ([3.0, 1.0, 2.0], 3)
    """

    on_host: ClassVar[frozenset[str]] = frozenset({"pushed"})
    rows: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0, name: str = "Queue", setting: str = "queue_size") -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a Queue holds at least one row of at least one number, got size={size} and dim={dim}")
        self.name, self.setting = name, setting
        rows = torch.randn(size, dim, generator=generator(seed, -1), dtype=torch.float32)
        self.register_buffer("rows", F.normalize(rows, dim=1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> int:
        """The number of rows that come from a batch; the others are still random."""
        return min(int(self.pushed), len(self.rows))

    def contents(self) -> Tensor:
        """A copy of all rows, which a later :meth:`push` does not change, also between forward and backward."""
        return self.rows.clone()

    def contents_with(self, rows: Tensor) -> Tensor:
        """The rows that a :meth:`push` of rows (N, dim) would leave, with the type of those, and nothing stored."""
        size, count = len(self.rows), len(rows)
        if count > size:
            raise ValueError(
                f"{self.name}: a batch of {count} rows does not fit into the queue of {size}; "
                f"pass a larger {self.setting}"
            )
        return self.contents().to(rows).index_copy_(0, self._next_places(count), rows)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Replace the oldest rows by rows (N, dim), of which the last ``size`` stay; call it in training only."""
        kept = rows[-len(self.rows) :]
        self.pushed += len(rows) - len(kept)
        self.rows.index_copy_(0, self._next_places(len(kept)), kept.to(self.rows))
        self.pushed += len(kept)

    def _next_places(self, count: int) -> Tensor:
        return (torch.arange(count, device=self.rows.device) + int(self.pushed)) % len(self.rows)

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return f"size={len(self.rows)}, dim={self.rows.shape[1]}"


def _classes(labels: Tensor, device: torch.device) -> Tensor:
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    return labels.to(device, torch.int64)
