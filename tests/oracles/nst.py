"""Neuron selectivity transfer: the squared MMD of the paper as sums over pairs of channels of one sample's map."""

import math
from collections.abc import Callable

import numpy as np

from tests.oracles.vectors import Row, Rows, dot, squares, unit


def mmd(s: Rows, t: Rows, k: Callable[[Row, Row], float]) -> float:
    def mean(a: Rows, b: Rows) -> float:
        return sum(k(x, y) for x in a for y in b) / (len(a) * len(b))

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


def variances(student: np.ndarray, teacher: np.ndarray) -> list[float]:
    """Of the Gaussian kernel, sample by sample: the mean squared distance of all pairs of channels."""
    found = []
    for s_map, t_map in zip(student, teacher, strict=True):
        both = [unit(c.reshape(-1)) for m in (s_map, t_map) for c in m]
        found.append(sum(squares(a, b) for a in both for b in both) / len(both) ** 2 or 1.0)
    return found


def nst(
    student: np.ndarray, teacher: np.ndarray, kernel: str = "polynomial", fixed: list[float] | None = None
) -> float:
    """Mean over the samples; maps (N, C, ...) of equally many positions, float64. ``fixed`` are variances."""
    total = 0.0
    each = fixed or (variances(student, teacher) if kernel == "gaussian" else [1.0] * len(student))
    for s_map, t_map, variance in zip(student, teacher, each, strict=True):
        s, t = ([unit(c.reshape(-1)) for c in m] for m in (s_map, t_map))
        if kernel == "linear":
            total += mmd(s, t, dot)
        elif kernel == "polynomial":
            total += mmd(s, t, lambda a, b: dot(a, b) ** 2)
        else:
            total += mmd(s, t, lambda a, b, v=variance: math.exp(-squares(a, b) / (2 * v)))
    return total / len(student)
