"""Descriptions of data sets in a few words and checksums, for results that are kept by row number."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.data.datasets.images import AugmentedSubset
from lightning_rkd.data.indexing import find_root


def describe_dataset(dataset: Any) -> dict[str, str]:
    """Class, length, transforms, content and augmentation of the root data set behind any depth of ``Subset``.

    The content is a checksum of the tensors, arrays and lists of integers among its attributes (of a part of the rows
    above 256 MiB); paths do not count. Only an :class:`~lightning_rkd.data.AugmentedSubset` with a number of ``views``
    counts as augmentation.
    """
    root, subset = find_root(dataset), find_views(dataset)
    attributes = sorted(getattr(root, "__dict__", {}).items())
    transforms = [f"{k}={without_addresses(repr(v))}" for k, v in attributes if "transform" in k and v is not None]
    augmentation = "none" if subset is None else f"{subset.augment!r}, seed {subset.seed}, {subset.views} views"
    digest = hashlib.sha256()
    for name, value in attributes:
        for array in _arrays(value):
            step = max(1, -(-array.nbytes // 2**28))
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array[::step] if array.ndim else array).data)
    return {
        "class": f"{type(root).__module__}.{type(root).__qualname__}",
        "length": str(len(root)),
        "transform": "; ".join(transforms) or "none",
        "content": digest.hexdigest()[:32],
        "augmentation": augmentation,
    }


def find_views(dataset: Any) -> AugmentedSubset | None:
    """The :class:`~lightning_rkd.data.AugmentedSubset` with a number of ``views`` above the root data set, if any."""
    while not isinstance(dataset, AugmentedSubset):
        if dataset is find_root(dataset):
            return None
        dataset = dataset.dataset
    return None if dataset.views is None else dataset


def without_addresses(text: str) -> str:
    """Text without memory addresses, which change from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


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


def describe_functions(functions: Sequence[Any]) -> str:
    """Names of functions and callable objects, and a checksum of their code, settings and tensors."""
    digest = hashlib.sha256()
    _digest_object(functions, digest.update, {})
    names = [getattr(f, "__qualname__", type(f).__qualname__) for f in functions]
    return f"{', '.join(names)} ({digest.hexdigest()[:16]})" if names else "none"


def _digest_object(value: Any, update: Callable[[bytes], None], seen: dict[int, Any]) -> None:
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept alive, so that no other object is given its id
    parts: Any = ()
    if isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        parts = (str(array.dtype), array.shape, array.tobytes())
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, set | frozenset):
        parts = sorted(map(repr, value))  # their order changes from run to run
    elif isinstance(value, CodeType):
        parts = (value.co_code, value.co_consts, value.co_names)
    elif isinstance(value, FunctionType):
        used = [value.__globals__.get(name) for name in value.__code__.co_names]
        used = [x for x in used if not isinstance(x, FunctionType) or x.__module__ == value.__module__]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, used)
    elif isinstance(value, MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, ModuleType):
        parts = (value.__name__,)
    else:
        update(without_addresses(repr(value)).encode())
        if not isinstance(value, type | Enum):
            parts = [part for item in getattr(value, "__dict__", {}).items() if item[0] != "training" for part in item]
    update(type(value).__qualname__.encode())
    for part in parts:
        _digest_object(part, update, seen)
