"""The tensors in a network's inputs, be they one tensor, a sequence or a mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def on_tensors(value: Any, function: Callable[[Tensor, str], Tensor], name: str = "inputs") -> Any:
    """The same structure with every tensor replaced; mappings become dicts, and what is no tensor stays.

    Args:
        value: A tensor, or a mapping or sequence of values.
        function: From a tensor and what messages call it to its replacement.
        name: What messages call the whole.

    Example:
        >>> import torch
        >>> on_tensors({"a": torch.ones(2), "b": [torch.zeros(1), "c"]}, lambda x, name: x + 1)
        {'a': tensor([2., 2.]), 'b': [tensor([1.]), 'c']}
    """
    if isinstance(value, Tensor):
        return function(value, name)
    if isinstance(value, Mapping):
        return {key: on_tensors(entry, function, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = [on_tensors(entry, function, f"{name}[{i}]") for i, entry in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in order.

    Example:
        >>> import torch
        >>> [len(x) for x in tensors({"a": torch.ones(2), "b": [torch.zeros(1), "c"]})]
        [2, 1]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from tensors(entry)
