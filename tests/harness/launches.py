"""Kernels that a computation launches on a GPU, counted without one and without Triton."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rkd.functional import _kernels as kernels
from lightning_rkd.utils.private import tree_leaves

needs_fake_gpu = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14),
    reason="PyTorch 2.6 and 2.8 abort on fake CUDA tensors where there is no driver; it is known to work from 2.14 on",
)

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class _Operations(TorchDispatchMode):
    """Notes each operation of PyTorch that does more than to allocate memory or to view it: at least one launch."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in tree_leaves(result))
        if there and not func.is_view and func.overloadpacket not in _ALLOCATIONS:
            self.launched.append(str(func))
        return result


@contextmanager
def kernels_without_triton(launched: list[str]) -> Iterator[None]:
    """Kernels for GPUs that compute nothing and note their names when they are launched."""
    importlib.import_module("torch._dynamo")  # which imports Triton, where it is

    def jit(function: Any) -> Any:
        return mock.MagicMock(__getitem__=lambda self, grid: lambda *args, **kwargs: launched.append(function.__name__))

    triton = ModuleType("triton")
    vars(triton).update(jit=jit, cdiv=lambda a, b: -(-a // b), language=SimpleNamespace(constexpr=int))
    names = [f"{kernels.__name__}.{name}" for name in ("distance_cuda", "angle_cuda", "rkd_cuda")]
    stubs = {"triton": triton, "triton.language": triton.language}
    before = {name: sys.modules.pop(name, None) for name in (*names, *stubs)}
    sys.modules |= stubs
    kernels.native.cache_clear()
    try:
        for name in names:
            importlib.import_module(name)
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        kernels.native.cache_clear()


@contextmanager
def fake_gpu() -> Iterator[list[str]]:
    """Tensors on a GPU that have no values; gives the names of the kernels and operations that are launched."""
    launched: list[str] = []
    with kernels_without_triton(launched), FakeTensorMode(allow_non_fake_inputs=True), _Operations(launched):
        yield launched


def list_nodes(loss: Tensor) -> list[Any]:
    """Functions in the graph of a loss, each before those that follow it in the backward pass; no leaves."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and node not in found and "AccumulateGrad" not in node.name():
            for following, _ in node.next_functions:
                visit(following)
            found.append(node)

    visit(loss.grad_fn)
    return found[::-1]


def run_backward(loss: Tensor, gradient: Tensor) -> None:
    """The backward pass, node by node: the engine would look for the device."""
    waiting: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: gradient}}
    with torch.no_grad():
        for node in list_nodes(loss):
            given = waiting.get(node, {})
            results = getattr(node, "apply", node)(*(given.get(i) for i in range(max(given, default=0) + 1)))
            results = results if isinstance(results, tuple) else (results,)
            # tensors come first among the arguments of our functions, and others have no entry
            for (following, i), result in zip(node.next_functions, results, strict=False):
                if following is not None and result is not None:
                    sums = waiting.setdefault(following, {})
                    sums[i] = sums[i] + result if i in sums else result
