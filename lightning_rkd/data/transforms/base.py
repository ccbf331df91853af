"""Common parts of the batch transforms: tensors in nested inputs, and draws that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SteppedTransform(nn.Module):
    """Base of the batch transforms whose draws depend on (seed, rank, step) alone.

    Steps are counted in a buffer, which checkpoints save, so a resumed run draws like the uninterrupted one.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step: int | None = 0  # the buffer's value: reading it from a GPU would wait for the step before

    def count_step(self) -> int:
        """Number of this step, from 0."""
        step = int(self.steps) if self._step is None else self._step
        self.steps += 1
        self._step = step + 1
        return step

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = None


def map_tensors(value: Any, function: Callable[[Tensor, str], Tensor], name: str = "inputs") -> Any:
    """Replace every tensor of a nested structure; mappings become dicts, and other values stay.

    Args:
        value: A tensor, or a mapping or sequence of values.
        function: From a tensor and its name in error messages to its replacement.
        name: Name of the whole in error messages.

    Example:
        >>> map_tensors({"a": torch.ones(2), "b": [torch.zeros(1), "c"]}, lambda x, name: x + 1)
        {'a': tensor([2., 2.]), 'b': [tensor([1.]), 'c']}
    """
    if isinstance(value, Tensor):
        return function(value, name)
    if isinstance(value, Mapping):
        return {key: map_tensors(entry, function, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = [map_tensors(entry, function, f"{name}[{i}]") for i, entry in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a nested structure.

    Example:
        >>> [len(x) for x in iterate_tensors({"a": torch.ones(2), "b": [torch.zeros(1), "c"]})]
        [2, 1]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from iterate_tensors(entry)
