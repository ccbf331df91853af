"""What a data set is, in a few words and checksums, so that results by row number are not read for another one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.data.datasets.images import AugmentedSubset
from lightning_rkd.data.indexing import root_of

_MOST_BYTES = 1 << 28


def describe(dataset: Any) -> dict[str, str]:
    """The root data set behind any depth of ``Subset``: its class, length, transforms and content.

    The content is a checksum of the tensors, arrays and lists of integers that are attributes of it (of a part of the
    rows, where they are larger than 256 MiB); paths count for nothing, so a folder may move.

    ``augmentation`` is what an :class:`~lightning_rkd.data.AugmentedSubset` with a number of ``views`` makes of
    its rows, and ``"none"`` for all others.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> about = describe(Subset(TensorDataset(torch.arange(3)), [2]))
        >>> about["class"], about["length"], about["transform"]
        ('torch.utils.data.dataset.TensorDataset', '3', 'none')
    """
    root, augmentation = root_of(dataset), "none"
    if (subset := augmented(dataset)) is not None and subset.views is not None:
        augmentation = f"{subset.augment!r}, seed {subset.seed}, {subset.views} views"
    transforms = {
        name: without_addresses(repr(value))
        for name, value in sorted(getattr(root, "__dict__", {}).items())
        if "transform" in name and value is not None
    }
    return {
        "class": f"{type(root).__module__}.{type(root).__qualname__}",
        "length": str(len(root)),
        "transform": "; ".join(f"{name}={value}" for name, value in transforms.items()) or "none",
        "content": _content(root),
        "augmentation": augmentation,
    }


def augmented(dataset: Any) -> AugmentedSubset | None:
    """The augmenting data set on the way from a data set to its root, if there is one."""
    while not isinstance(dataset, AugmentedSubset):
        inner = getattr(dataset, "dataset", None)
        if inner is None or dataset is root_of(dataset):
            return None
        dataset = inner
    return dataset


def without_addresses(text: str) -> str:
    """A ``repr`` without what changes from run to run.

    Example:
        >>> without_addresses("<function crop at 0x7f3a>")
        '<function crop>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _content(root: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(getattr(root, "__dict__", {}).items()):
        for array in _arrays(value):
            step = max(1, -(-array.nbytes // _MOST_BYTES))
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array[::step] if array.ndim else array).data)
    return digest.hexdigest()[:32]


def _arrays(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.dtype != torch.bfloat16:
            yield value.detach().cpu().numpy()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if value and all(type(x) is int for x in value):
            yield np.array(value)
        elif all(isinstance(x, Tensor | np.ndarray) for x in value):
            for x in value:
                yield from _arrays(x)
