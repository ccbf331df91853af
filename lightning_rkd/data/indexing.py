"""Batches that know which rows of the data set they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
)

from lightning_rkd.utils.types import Batch


@runtime_checkable
class _Movable(Protocol):
    def to(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(init=False)
class IndexedBatch:
    """What a loader yielded, and the rows of the root data set it came from.

    Attributes:
        batch: The batch as the loader would have yielded it.
        indices: Row of each sample in the root data set, shape (N,), int64, on the CPU or moved along.
        epoch: The epoch in which the samples were drawn, where the sampler says
            (:class:`~lightning_rkd.data.Draw`).
        host_indices: The indices on the CPU, once ``indices`` have been moved.
    """

    batch: Any
    indices: Tensor

    def __init__(self, batch: Any, indices: Tensor, epoch: int = 0, host_indices: Tensor | None = None) -> None:
        self.batch, self.indices = batch, indices
        self.epoch, self.host_indices = epoch, host_indices  # no fields: Lightning takes the size of a batch from those

    def to(self, *args: Any, **kwargs: Any) -> IndexedBatch:
        """Move everything inside that can be moved, as ``Tensor.to`` would a tensor; indices keep their type.

        Example:
            >>> moved = IndexedBatch((torch.zeros(2, 3), ["a", "b"]), torch.tensor([4, 7])).to("cpu")
            >>> moved.batch[0].shape, moved.indices.tolist()
            (torch.Size([2, 3]), [4, 7])
        """
        batch = apply_to_collection(self.batch, _Movable, lambda x: x.to(*args, **kwargs))
        device = torch.empty(0).to(*args, **kwargs).device
        indices = self.indices.to(device, non_blocking=kwargs.get("non_blocking", False))
        host = self.indices if self.host_indices is None and self.indices.device.type == "cpu" else self.host_indices
        return IndexedBatch(batch, indices, self.epoch, host)

    def pin_memory(self) -> IndexedBatch:
        """Copy every tensor to page-locked memory; a :class:`~torch.utils.data.DataLoader` calls this."""
        batch = apply_to_collection(self.batch, _Pinnable, lambda x: x.pin_memory())
        return IndexedBatch(batch, self.indices.pin_memory(), self.epoch, self.host_indices)


@runtime_checkable
class _Pinnable(Protocol):
    def pin_memory(self) -> Any: ...


def to_batch(batch: Any, unpack: Callable[[Any], Batch]) -> Batch:
    """What ``unpack`` makes of a batch, with the indices of an :class:`IndexedBatch` unless it finds some itself.

    Example:
        >>> to_batch(IndexedBatch(torch.ones(2, 3), torch.tensor([4, 7])), Batch).indices
        tensor([4, 7])
    """
    if not isinstance(batch, IndexedBatch):
        return unpack(batch)
    found = unpack(batch.batch)
    if found.indices is not None:
        return replace(found, epoch=batch.epoch)
    return replace(found, indices=batch.indices, epoch=batch.epoch, host_indices=batch.host_indices)


def with_indices(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader, yielding :class:`IndexedBatch`.

    An index is the row in the *root* data set: :class:`~torch.utils.data.Subset`, however deep, is looked through;
    every other data set (a ``ConcatDataset`` too) is a root. Sampler, batch sampler, workers, ``collate_fn``,
    pinning, generator and ``worker_init_fn`` are kept, so the batches are those of the original loader.

    Args:
        loader: Any loader over a map-style data set. A loader that already yields indices is returned as it is. A
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
    kind = DataLoader if own_init else type(loader)
    if loader.batch_size is None:
        batching: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    else:
        batching = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    if loader.pin_memory_device:
        batching["pin_memory_device"] = loader.pin_memory_device
    return kind(
        _WithIndices(data),
        **batching,
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),  # type: ignore[arg-type]
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


@dataclass(slots=True)
class _Fetched:
    """The samples of one batch before collating."""

    samples: Any
    rows: list[int]
    epoch: int


class _WithIndices(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], root_row(self.dataset, index)

    def __getitems__(self, indices: Sequence[int]) -> _Fetched:
        rows = [root_row(self.dataset, i) for i in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        epoch = getattr(indices[0], "epoch", 0) if rows else 0
        return _Fetched(fetch(indices) if fetch else [self.dataset[i] for i in indices], rows, epoch)


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: _Fetched) -> IndexedBatch:
        rows = torch.tensor(fetched.rows, dtype=torch.int64)
        return IndexedBatch(self.collate(fetched.samples), rows, fetched.epoch)


def root_row(dataset: Any, index: int) -> int:
    """The row of the root data set that ``dataset[index]`` shows, through any depth of ``Subset``.

    Example:
        >>> root_row(Subset(Subset(range(9), [8, 6, 4]), [2, 0]), 0)
        4
    """
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


class RowNumbers:
    """Numbers the rows of one pass over an evaluation loader on one of several ranks.

    A distributed sampler repeats rows to fill its last batch; only those who know the numbers count them once.

    Args:
        loader: The rank's own loader.
        ranks: How many ranks there are; one alone needs no numbers.
    """

    def __init__(self, loader: Any, ranks: int) -> None:
        self.ranks, self.position = ranks, 0
        self.order = _rows_in_order(loader) if ranks > 1 else None

    def number(self, batch: Batch, rows: int, device: torch.device, *, needed: bool) -> None:
        """Give the next batch its indices, where it has none and the sampler tells them.

        Args:
            batch: The batch, in the order of the loader.
            rows: How many rows it has.
            device: Where the indices are wanted.
            needed: Whether somebody counts rows by their indices.

        Raises:
            ValueError: They are needed on several ranks, and cannot be known.
        """
        if batch.indices is None and self.order is not None:
            own = self.order[self.position : self.position + rows]
            batch.indices = torch.tensor(own, dtype=torch.int64, device=device)
        self.position += rows
        if batch.indices is None and self.ranks > 1 and needed:
            raise ValueError(
                f"on {self.ranks} devices the rows that a distributed sampler repeats must be known to be counted "
                "once, and this loader's sampler does not tell them: wrap it, with_indices(loader), or name the entry "
                "of the batch that holds them, indices=..."
            )


def _rows_in_order(loader: Any) -> list[int] | None:
    """The data set rows this rank's loader yields, in order, where its sampler tells without being disturbed."""
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    # not their subclasses: Lightning wraps other samplers in one, and asking a random one changes what it says next
    if type(loader.sampler) in (DistributedSampler, SequentialSampler):
        return [root_row(loader.dataset, row) for row in loader.sampler]
    return None


def root_of(dataset: Any) -> Any:
    """The data set at the bottom of any depth of ``Subset``.

    Example:
        >>> root_of(Subset(Subset(range(9), [8, 6, 4]), [2, 0]))
        range(0, 9)
    """
    while isinstance(dataset, Subset | _WithIndices):
        dataset = dataset.dataset
    return dataset


def number_batches(loaders: Any) -> Any:
    """The same loaders through :func:`with_indices`: one, a mapping, a sequence, or Lightning's ``CombinedLoader``.

    Raises:
        TypeError: A loader that has no rows to number.
    """
    if isinstance(getattr(loaders, "iterables", None), Mapping | list | tuple):
        return type(loaders)(number_batches(loaders.iterables), loaders._mode)
    if isinstance(loaders, Mapping):
        return {key: number_batches(loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(number_batches(loader) for loader in loaders)
    return with_indices(loaders)


def loaders_in(loaders: Any) -> list[Any]:
    """The loaders in a mapping, a sequence or Lightning's ``CombinedLoader``; or the one that it is."""
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [one for each in loaders for one in loaders_in(each)]
    return [] if loaders is None else [loaders]


def plain_collate(loader: DataLoader[Any]) -> Callable[[Any], Any]:
    """What makes a batch of samples in a loader, with or without indices."""
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, _Collate) else collate


def root_size(dataset: Any) -> int | None:
    """How many rows the root data set has, one more than the largest index there can be; ``None`` where it has no size.

    Example:
        >>> root_size(Subset(Subset(range(9), [8, 6, 4]), [2, 0]))
        9
    """
    dataset = root_of(dataset)
    try:
        return None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError):
        return None


def samples_of(loader: Any) -> int | None:
    """The size of the root data set behind a loader; ``None`` where it is not known.

    Example:
        >>> samples_of(DataLoader(range(9), batch_size=4)), samples_of(DataLoader([range(4)], batch_size=None))
        (9, None)
    """
    batches = isinstance(loader, DataLoader) and loader.batch_sampler is not None  # else its rows are batches already
    return root_size(loader.dataset) if batches else None


def first_samples(loaders: Any, count: int = 2) -> Any:
    """A batch of the first samples, as the steps would see it; ``None`` where a loader is not of the map style.

    Neither a sampler nor a worker is started. Several loaders, in a mapping, a sequence or Lightning's
    ``CombinedLoader``, give a batch of batches.

    Example:
        >>> loader = DataLoader(range(5), batch_size=4, shuffle=True)
        >>> first_samples(loader), first_samples({"a": loader})
        (tensor([0, 1]), {'a': tensor([0, 1])})
    """
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        batches = {key: first_samples(loader, count) for key, loader in loaders.items()}
        return None if any(batch is None for batch in batches.values()) else batches
    if isinstance(loaders, list | tuple):
        parts = [first_samples(loader, count) for loader in loaders]
        return None if not parts or any(part is None for part in parts) else parts
    return _first_samples(loaders, count)


def _first_samples(loader: Any, count: int) -> Any:
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or root_size(dataset) is None:
        return None
    rows = range(min(count, len(loader.dataset)))  # type: ignore[arg-type] # a sized one
    if isinstance(dataset, _WithIndices):
        return loader.collate_fn(dataset.__getitems__(rows))  # type: ignore[arg-type] # its own collate_fn
    if loader.batch_sampler is None:
        return loader.collate_fn(loader.dataset[0]) if rows else None
    fetch = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(fetch(list(rows)) if fetch else [loader.dataset[i] for i in rows])
