"""Wrapping a method of one module instance, for any number of callbacks, and removing the wrappers without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from lightning_rkd.data.indexing import IndexedBatch

Around = Callable[..., Any]
"""``around(call, *args, **kwargs)`` runs around the method: ``call(*args, **kwargs)`` is what lies inside."""


class MethodPatch:
    """Stands in for ``module.<method>``; shared by all callbacks, so the order of removal does not matter.

    An :class:`~lightning_rkd.data.indexing.IndexedBatch` is unwrapped before the module's own code sees it. Copies and
    pickles of the module have the plain method.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.had_own = method in vars(module)
        self.original: Callable[..., Any] = getattr(module, method)
        # Lightning reads the arguments of a step from here
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)
        self.arounds: list[Around] = []

    @classmethod
    def add(cls, module: nn.Module, method: str, around: Around) -> Callable[[], None]:
        """Run ``around`` around the method from now on; returns the function that undoes it (safe to call twice)."""
        installed = vars(module).get(method)
        patch = installed if isinstance(installed, cls) else cls(module, method)
        vars(module)[method] = patch
        patch.arounds.append(around)

        def undo() -> None:
            if around in patch.arounds:
                patch.arounds.remove(around)
            if not patch.arounds and vars(module).get(method) is patch:
                if patch.had_own:
                    vars(module)[method] = patch.original
                else:
                    del vars(module)[method]

        return undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method inside all wrappers."""
        call: Callable[..., Any] = self._inside
        for around in self.arounds:
            call = partial(around, call)
        return call(*args, **kwargs)

    def _inside(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], IndexedBatch):
            args = (args[0].batch, *args[1:])
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.had_own:
            return copy.deepcopy(self.original, memo)
        return _plain(memo.get(id(self.module), self.module), self.method)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.had_own:
            return _same, (self.original,)
        return _plain, (self.module, self.method)


def _plain(module: nn.Module, method: str) -> Callable[..., Any]:
    return MethodType(getattr(type(module), method), module)


def _same(value: Any) -> Any:
    return value


def unwrap_batches(module: nn.Module) -> list[Callable[[], None]]:
    """Let the evaluation steps of a module see batches as its loaders made them; returns what undoes it."""
    steps = ("validation_step", "test_step", "predict_step")
    return [MethodPatch.add(module, step, _through) for step in steps]


def _through(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)
