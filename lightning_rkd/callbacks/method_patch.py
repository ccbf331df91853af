"""Wrapping of a method of one module instance by any number of callbacks, and removal of the wrappers."""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from lightning_rkd.data.indexing import IndexedBatch

Wrapper = Callable[..., Any]
"""A wrapper, called as ``around(call, *args, **kwargs)``; ``call(*args, **kwargs)`` runs the wrapped method."""


class MethodPatch:
    """Replacement of ``module.<method>`` that runs the method inside the wrappers of all callbacks.

    All callbacks share it, so that they can be removed in any order. The method itself receives the batch inside an
    :class:`~lightning_rkd.data.indexing.IndexedBatch`. Copies and pickles of the module have the original method.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.had_own = method in vars(module)
        self.original: Callable[..., Any] = getattr(module, method)
        # Lightning reads the arguments of a step from here
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)
        self.wrappers: list[Wrapper] = []

    @classmethod
    def add(cls, module: nn.Module, method: str, around: Wrapper) -> Callable[[], None]:
        """Wrap a method; returns the function that undoes it, which may be called twice."""
        installed = vars(module).get(method)
        patch = installed if isinstance(installed, cls) else cls(module, method)
        vars(module)[method] = patch
        patch.wrappers.append(around)

        def undo() -> None:
            if around in patch.wrappers:
                patch.wrappers.remove(around)
            if not patch.wrappers and vars(module).get(method) is patch:
                if patch.had_own:
                    vars(module)[method] = patch.original
                else:
                    del vars(module)[method]

        return undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method inside its wrappers."""
        call: Callable[..., Any] = self._call_original
        for around in self.wrappers:
            call = partial(around, call)
        return call(*args, **kwargs)

    def _call_original(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], IndexedBatch):
            args = (args[0].batch, *args[1:])
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.had_own:
            return copy.deepcopy(self.original, memo)
        return _get_method(memo.get(id(self.module), self.module), self.method)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.had_own:
            return _get_original, (self.original,)
        return _get_method, (self.module, self.method)


def _get_method(module: nn.Module, method: str) -> Callable[..., Any]:
    return MethodType(getattr(type(module), method), module)


def _get_original(original: Any) -> Any:
    return original


def unwrap_batches(module: nn.Module) -> list[Callable[[], None]]:
    """Unwrap the batches of a module's evaluation steps, unless it does so; returns the functions that undo it."""
    if getattr(module, "unwraps_batches", False):
        return []
    steps = ("validation_step", "test_step", "predict_step")
    return [MethodPatch.add(module, step, _pass_on) for step in steps]


def _pass_on(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)
