"""A loss against its loops: the value, and the gradients by central differences."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses.base import RelationalLoss


def det(n: int, d: int, a: float, b: float) -> Tensor:
    """Inputs on which published code was run."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def central_differences(loops: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a function of one array, entry by entry."""
    slopes = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        slopes[place] = (loops(up) - loops(down)) / (2 * step)
    return slopes


def check_gradients(
    value: torch.Tensor, leaves: Mapping[str, torch.Tensor], loops: Callable[[dict[str, np.ndarray]], float]
) -> None:
    """The value, and its gradients to leaves in float64, are those of loops that take the leaves by name."""
    arrays = {name: x.detach().numpy().copy() for name, x in leaves.items()}
    assert value.item() == pytest.approx(loops(arrays), rel=1e-9, abs=1e-13)
    grads = torch.autograd.grad(value, [*leaves.values()], retain_graph=True, materialize_grads=True)
    scale = max(1.0, abs(value.item()))
    for (name, x), grad in zip(arrays.items(), grads, strict=True):
        slopes = central_differences(lambda moved, name=name: loops(arrays | {name: moved}), x)
        np.testing.assert_allclose(grad.numpy(), slopes, rtol=1e-5, atol=1e-8 * scale, err_msg=name)


def check_against_loops(
    loss: RelationalLoss,
    loops: Callable[..., float],
    student: list[np.ndarray],
    teacher: list[np.ndarray],
    gradient: bool = True,
    **context: Any,
) -> None:
    """Value, and gradients to the student and to the loss's own parameters, which ``loops`` takes by name."""
    single = loss.reads != "feature_maps"

    def unpacked(values: list[Any]) -> Any:
        return values[0] if single else values

    leaves = [torch.from_numpy(x).requires_grad_() for x in student]
    given = unpacked(leaves), unpacked([torch.from_numpy(x) for x in teacher])
    loss.double().materialize(*given, like=torch.empty(0, dtype=torch.float64))
    for p in loss.double().parameters():
        p.data.normal_()
    own = dict(loss.named_parameters())

    def value(arrays: dict[str, np.ndarray]) -> float:
        parameters = [{name: arrays[name] for name in own}] if own else []
        return loops(unpacked([arrays[str(i)] for i in range(len(student))]), unpacked(teacher), *parameters)

    every = {str(i): x for i, x in enumerate(leaves)} | own
    ours = loss(*given, **context)
    if gradient:
        check_gradients(ours, every, value)
        return
    assert ours.item() == pytest.approx(value({k: x.detach().numpy() for k, x in every.items()}), rel=1e-9, abs=1e-13)
    grads = torch.autograd.grad(ours, [*every.values()], allow_unused=True, materialize_grads=True)
    assert all(torch.isfinite(grad).all() for grad in grads)
