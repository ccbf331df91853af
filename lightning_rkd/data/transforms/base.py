"""Common parts of the batch transforms: tensors in nested inputs, and draws that a resumed run repeats."""

import inspect
from collections.abc import Callable, Mapping, Sequence
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

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in inspect.signature(type(self)).parameters)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = None


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], name: str = "inputs") -> Any:
    """Apply a function of a tensor and its name to all tensors of a nested structure; mappings become dicts."""
    if isinstance(value, Tensor):
        return function(value, name)
    if isinstance(value, Mapping):
        return {key: map_tensors(entry, function, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = [map_tensors(entry, function, f"{name}[{i}]") for i, entry in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def list_tensors(value: Any) -> list[Tensor]:
    """List the tensors of a nested structure."""
    found: list[Tensor] = []
    map_tensors(value, lambda x, _: found.append(x))
    return found
