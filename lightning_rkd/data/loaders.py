"""Loaders in the structures that Lightning takes: one, a mapping, a sequence, or a ``CombinedLoader``."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from torch.utils.data import DataLoader

from lightning_rkd.data.indexing import count_root_rows, fetch_samples, with_indices
from lightning_rkd.utils.private import tree_leaves, tree_map


def list_loaders(loaders: Any) -> list[Any]:
    """List the loaders in a structure; none for ``None``."""
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [one for each in loaders for one in list_loaders(each)]
    return [] if loaders is None else [loaders]


def number_batches(loaders: Any) -> Any:
    """Apply :func:`~lightning_rkd.data.indexing.with_indices` to every loader in a structure."""
    if not hasattr(loaders, "iterables"):
        return tree_map(with_indices, loaders)
    numbered = copy(loaders)
    numbered.flattened = [with_indices(loader) for loader in loaders.flattened]
    return numbered


def count_samples(loader: Any) -> int | None:
    """Number of rows of the root data set of a loader; ``None`` where it is not known."""
    batches = isinstance(loader, DataLoader) and loader.batch_sampler is not None  # else a row is a batch already
    return count_root_rows(loader.dataset) if batches else None


def load_first_samples(loaders: Any) -> Any:
    """The first two samples as a training batch, in its structure; ``None`` if a loader is not of the map style.

    Neither a sampler nor a worker is started.
    """
    loaders = getattr(loaders, "iterables", loaders)
    batches = [load_samples(loader, range(2)) for loader in tree_leaves(loaders)]
    if not batches or any(batch is None for batch in batches):
        return None
    remaining = iter(batches)
    return tree_map(lambda _: next(remaining), loaders)


def load_samples(loader: Any, samples: Sequence[int]) -> Any:
    """Some samples of a loader's data set, of those that it has, as a batch; ``None`` if it is not of the map style."""
    if not isinstance(loader, DataLoader) or count_root_rows(loader.dataset) is None:
        return None
    rows = [row for row in samples if row < len(loader.dataset)]  # type: ignore[arg-type] # it has a size
    if loader.batch_sampler is None:
        return loader.collate_fn(loader.dataset[0]) if rows else None
    return loader.collate_fn(fetch_samples(loader.dataset, rows))
