"""Batches that carry the rows of the data set they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_rkd.utils.types import Batch


@runtime_checkable
class _Movable(Protocol):
    def to(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class _Pinnable(Protocol):
    def pin_memory(self) -> Any: ...


@dataclass(init=False)
class IndexedBatch:
    """A loader's batch, and the rows of the root data set it comes from.

    Attributes:
        batch: The batch as the loader would have yielded it.
        indices: Row of each sample in the root data set, (N,), int64.
        epoch: The epoch in which the samples were drawn, if the sampler tells (:class:`~lightning_rkd.data.Draw`).
        host_indices: The indices on the CPU, once ``indices`` have been moved.
    """

    batch: Any
    indices: Tensor

    def __init__(self, batch: Any, indices: Tensor, epoch: int = 0, host_indices: Tensor | None = None) -> None:
        self.batch, self.indices = batch, indices
        self.epoch, self.host_indices = epoch, host_indices  # not fields: Lightning finds a batch's size among those

    def to(self, *args: Any, **kwargs: Any) -> IndexedBatch:
        """Move or cast everything inside, as ``Tensor.to`` would; indices keep their type."""
        batch = apply_to_collection(self.batch, _Movable, lambda x: x.to(*args, **kwargs))
        device = torch.empty(0).to(*args, **kwargs).device
        indices = self.indices.to(device, non_blocking=kwargs.get("non_blocking", False))
        host = self.indices if self.host_indices is None and self.indices.device.type == "cpu" else self.host_indices
        return IndexedBatch(batch, indices, self.epoch, host)

    def pin_memory(self) -> IndexedBatch:
        """Copy every tensor to page-locked memory, for a :class:`~torch.utils.data.DataLoader`."""
        batch = apply_to_collection(self.batch, _Pinnable, lambda x: x.pin_memory())
        return IndexedBatch(batch, self.indices.pin_memory(), self.epoch, self.host_indices)


def to_batch(batch: Any, unpack: Callable[[Any], Batch]) -> Batch:
    """Apply ``unpack`` to a batch, and add the indices of an :class:`IndexedBatch` unless the batch holds some."""
    if not isinstance(batch, IndexedBatch):
        return unpack(batch)
    found = unpack(batch.batch)
    if found.indices is not None:
        return replace(found, epoch=batch.epoch)
    return replace(found, indices=batch.indices, epoch=batch.epoch, host_indices=batch.host_indices)


def with_indices(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Rebuild a loader so that it yields :class:`IndexedBatch`.

    An index is the row in the *root* data set, below any depth of :class:`~torch.utils.data.Subset`; every other data
    set (a ``ConcatDataset`` too) is a root. Sampler, batch sampler, workers, ``collate_fn``, pinning, generator and
    ``worker_init_fn`` are kept, so the batches are those of the original loader.

    Args:
        loader: Any loader over a map-style data set. A loader that already yields indices is returned unchanged. A
            subclass of ``DataLoader`` keeps its class, unless it has an ``__init__`` of its own.

    Returns:
        A new loader; the original one stays usable.

    Raises:
        TypeError: Iterable-style data sets and ``batch_size=None``, which have no batches of rows to number, and
            loader classes that could not be rebuilt faithfully.

    Example:
        >>> data = Subset(Subset(torch.arange(100), range(50, 100)), range(0, 50, 10))
        >>> [(b.batch.tolist(), b.indices.tolist()) for b in with_indices(DataLoader(data, batch_size=2))]
        [([50, 60], [50, 60]), ([70, 80], [70, 80]), ([90], [90])]
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"with_indices takes a torch DataLoader, got {type(loader).__name__}")
    data: Any = loader.dataset
    if isinstance(data, _WithIndices):
        return loader
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"with_indices needs a map-style data set, and {type(data).__name__} is iterable: its samples have no row "
            "numbers. Let it yield an index with every sample and name it with indices=..."
        )
    if loader.batch_sampler is None:
        raise TypeError(
            "with_indices needs a loader that batches, and this one has batch_size=None: give it a batch size, or a "
            "batch_sampler, and move its collating into collate_fn"
        )
    own_init = any("__init__" in vars(c) for c in type(loader).__mro__[: type(loader).__mro__.index(DataLoader)])
    if own_init and type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"with_indices cannot rebuild a {type(loader).__name__}, which has an __init__ and an __iter__ of its own: "
            "apply with_indices to the DataLoader inside it"
        )
    batching = ("batch_sampler",) if loader.batch_size is None else ("batch_size", "sampler", "drop_last")
    others = [
        "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
        "prefetch_factor", "persistent_workers", "in_order",
    ]  # fmt: skip
    if loader.pin_memory_device:
        others.append("pin_memory_device")
    kind: Any = DataLoader if own_init else type(loader)
    rebuilt: DataLoader[Any] = kind(
        _WithIndices(data),
        collate_fn=_Collate(loader.collate_fn),
        **{name: getattr(loader, name) for name in (*batching, *others)},
    )
    return rebuilt


class _WithIndices(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, list[int], int]:
        rows = [find_root_row(self.dataset, i) for i in indices]
        epoch = getattr(indices[0], "epoch", 0) if rows else 0
        return fetch_samples(self.dataset, indices), rows, epoch


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: tuple[Any, list[int], int]) -> IndexedBatch:
        samples, rows, epoch = fetched
        return IndexedBatch(self.collate(samples), torch.tensor(rows, dtype=torch.int64), epoch)


def fetch_samples(dataset: Any, indices: Sequence[int]) -> Any:
    """Samples of a map-style data set, at once where it can, as a loader fetches them."""
    fetch = getattr(dataset, "__getitems__", None)
    return fetch(indices) if fetch else [dataset[i] for i in indices]


def get_collate(loader: DataLoader[Any]) -> Callable[[Any], Any]:
    """``collate_fn`` of a loader without the part that adds indices."""
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, _Collate) else collate


def find_root(dataset: Any) -> Any:
    """The data set below any depth of ``Subset``."""
    while isinstance(dataset, Subset | _WithIndices):
        dataset = dataset.dataset
    return dataset


def find_root_row(dataset: Any, index: int) -> int:
    """The row of the root data set that ``dataset[index]`` comes from."""
    while True:
        try:
            row = int(index)
        except (TypeError, ValueError):
            raise TypeError(f"an index must be an integer to number a sample, the sampler gave {index!r}") from None
        if row < 0:
            row += len(dataset)
        if not isinstance(dataset, Subset):
            return row
        dataset, index = dataset.dataset, dataset.indices[row]


def count_root_rows(dataset: Any) -> int | None:
    """Number of rows of the root data set, one more than the largest index; ``None`` where it has no size."""
    dataset = find_root(dataset)
    try:
        return None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError):
        return None
