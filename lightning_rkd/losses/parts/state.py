"""Base of modules with buffers that training updates: memories, queues, running estimates."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class StepState(nn.Module):
    """A module whose buffers change from step to step, and only in training.

    The engine leaves such buffers out of what DistributedDataParallel broadcasts (every rank updates its own copy from
    the rows of all ranks, so the copies are the same) and refuses optimisers that call the loss several times a step.
    All state is in buffers, so that a checkpoint resumes exactly.

    Class attributes:
        on_host: Names of the buffers that stay in host memory wherever the module is moved: counters, which the host
            can then read without waiting for a device.

    Example:
        >>> import torch
        >>> class Steps(StepState):
        ...     on_host = frozenset({"count"})
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        >>> Steps().to("meta").count
        tensor(0)
    """

    on_host: ClassVar[frozenset[str]] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in self.on_host}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        return self
