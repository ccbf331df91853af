"""A loss of the student's first columns, several times."""

from collections.abc import Callable, Sequence

import numpy as np


def matryoshka(
    loops: Callable[..., float],
    student: np.ndarray,
    teacher: np.ndarray,
    *parameters: dict[str, np.ndarray],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    loss: object = None,
) -> float:
    """Without ``loss``, which the loops stand for."""
    total, weights = 0.0, weights or [1 / len(dims)] * len(dims)
    for k, d in enumerate(dims):
        prefix = f"losses.{k}."
        own = [{name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)} for p in parameters]
        total += weights[k] * loops(student[:, :d], teacher, *own)
    return total
