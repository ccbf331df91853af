"""Loaders in the structures that Lightning takes: one, a mapping, a sequence, or a ``CombinedLoader``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from lightning_rkd.data.indexing import count_root_rows, fetch_samples, with_indices


def list_loaders(loaders: Any) -> list[Any]:
    """List the loaders in a structure; none for ``None``."""
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [one for each in loaders for one in list_loaders(each)]
    return [] if loaders is None else [loaders]


def number_batches(loaders: Any) -> Any:
    """Apply :func:`~lightning_rkd.data.indexing.with_indices` to every loader in a structure.

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


def count_samples(loader: Any) -> int | None:
    """Number of rows of the root data set of a loader; ``None`` where it is not known.

    Example:
        >>> count_samples(DataLoader(range(9), batch_size=4)), count_samples(DataLoader([range(4)], batch_size=None))
        (9, None)
    """
    batches = isinstance(loader, DataLoader) and loader.batch_sampler is not None  # else a row is a batch already
    return count_root_rows(loader.dataset) if batches else None


def load_first_samples(loaders: Any, count: int = 2) -> Any:
    """A batch of the first samples in the structure of a training batch; ``None`` if a loader is not of the map style.

    Neither a sampler nor a worker is started.

    Example:
        >>> loader = DataLoader(range(5), batch_size=4, shuffle=True)
        >>> load_first_samples(loader), load_first_samples({"a": loader})
        (tensor([0, 1]), {'a': tensor([0, 1])})
    """
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        batches = {key: load_first_samples(loader, count) for key, loader in loaders.items()}
        return None if any(batch is None for batch in batches.values()) else batches
    if isinstance(loaders, list | tuple):
        parts = [load_first_samples(loader, count) for loader in loaders]
        return None if not parts or any(part is None for part in parts) else parts
    if not isinstance(loaders, DataLoader) or count_root_rows(loaders.dataset) is None:
        return None
    rows = list(range(min(count, len(loaders.dataset))))  # type: ignore[arg-type] # it has a size
    if loaders.batch_sampler is None:
        return loaders.collate_fn(loaders.dataset[0]) if rows else None
    return loaders.collate_fn(fetch_samples(loaders.dataset, rows))
