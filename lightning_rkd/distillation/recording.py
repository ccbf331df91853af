"""Recording of the calls of a network's layers by forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_rkd.utils.private import count_writes
from lightning_rkd.utils.types import Outputs


class Hook:
    """A forward hook that does nothing in copies and pickles of its module."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *call: Any) -> None:
        """Pass on module, args, kwargs and, in a hook after the layer, its output."""
        if self.function is not None:
            self.function(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Recorder:
    """Recorder of the calls of hooked layers, between ``start`` and ``stop``. Copies and pickles have no hooks."""

    def __init__(self) -> None:
        self.on = False
        self._handles: list[RemovableHandle] = []
        self._calls: list[list[Any]] = []
        self._earlier: list[list[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": [], "_calls": [], "_earlier": [], "on": False}

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()

    def start(self) -> None:
        """Start recording; discard earlier calls."""
        self._calls, self._earlier, self.on = [[] for _ in self._handles], [], True

    @property
    def ran(self) -> bool:
        """True if a layer has run since :meth:`start`."""
        return any(self._calls) or any(self._earlier)

    def restart(self) -> None:
        """Start anew; the calls recorded so far are used if no layer runs again."""
        if self.on and any(self._calls):
            earlier = self._calls
            self.start()
            self._earlier = earlier

    def stop(self) -> None:
        """Stop recording and discard the recorded calls."""
        self._calls, self._earlier, self.on = [], [], False

    def _collect_calls(self) -> list[list[Any]]:
        calls = self._calls if any(self._calls) or not self._earlier else self._earlier
        self._calls, self._earlier, self.on = [], [], False
        return calls


class Record:
    """Outputs of one call, protected from later in-place operations.

    The tensors themselves are preferred to their copies, since gradients then add up in the same order, and to the same
    bits, as for a loss written in ``training_step``.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._original = outputs
        self.rows: int | None = None
        self._tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        counted = not torch.compiler.is_compiling()
        for x in outputs.tensors():
            self.rows = len(x) if self.rows is None else self.rows
            if id(x) not in self._tensors:
                counted = counted and not x.is_inference()
                self._tensors[id(x)] = x, x.clone(), count_writes(x) if counted else -1
        self._counted = counted  # writes are not counted in inference mode and under compilation

    def outputs(self) -> Outputs:
        """The outputs as they were when the layer returned."""
        unchanged = self._counted
        for x, _, version in self._tensors.values():
            unchanged = unchanged and count_writes(x) == version
        return self._original if unchanged else self._original.map(lambda x: self._tensors[id(x)][1])


def join_calls(records: list[Record]) -> Outputs:
    """Concatenate the rows of several calls."""
    if len(records) == 1:
        return records[0].outputs()
    calls = [record.outputs() for record in records]

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        tensors = [p for p in parts if p is not None]
        same = len(tensors) == len(parts) and len({p.shape[1:] for p in tensors}) == 1
        return torch.cat(tensors) if same else None  # maps of different crops cannot be one tensor

    maps = [cat(list(level)) for level in zip(*(one.feature_maps or [] for one in calls), strict=True)]
    return Outputs(
        embedding=cat([one.embedding for one in calls]),
        logits=cat([one.logits for one in calls]),
        feature_maps=[m for m in maps if m is not None] if maps and all(m is not None for m in maps) else None,
        classifier=calls[-1].classifier,
    )
