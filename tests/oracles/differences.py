"""A loss against its loops: the value, and the gradients by central differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_rkd.losses.base import RelationalLoss


def central_differences(loops: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a function of one array, entry by entry."""
    slopes = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        slopes[place] = (loops(up) - loops(down)) / (2 * step)
    return slopes


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
    arrays = {name: p.detach().numpy().copy() for name, p in own.items()}

    def value(students: list[np.ndarray], parameters: dict[str, np.ndarray]) -> float:
        return loops(unpacked(students), unpacked(teacher), *([parameters] if parameters else []))

    ours, expected = loss(*given, **context), value(student, arrays)
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-13)
    grads = torch.autograd.grad(ours, [*leaves, *own.values()], allow_unused=True, materialize_grads=True)
    assert all(torch.isfinite(grad).all() for grad in grads)
    if not gradient:
        return
    slopes = [
        central_differences(lambda x, i=i: value([*student[:i], x, *student[i + 1 :]], arrays), x)
        for i, x in enumerate(student)
    ]
    slopes += [central_differences(lambda x, k=k: value(student, arrays | {k: x}), x) for k, x in arrays.items()]
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad.numpy(), slope, rtol=1e-5, atol=1e-8 * max(1, abs(expected)))
