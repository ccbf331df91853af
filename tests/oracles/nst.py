"""Neuron selectivity transfer: the squared MMD of the paper as sums over pairs of channels of one sample's map."""

import math
from collections.abc import Callable

import numpy as np


def unit(v: np.ndarray) -> list[float]:
    length = math.sqrt(sum(float(x) ** 2 for x in v))
    return [float(x) / length if length > 0 else 0.0 for x in v]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def gap(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def mmd(s: list[list[float]], t: list[list[float]], k: Callable[[list[float], list[float]], float]) -> float:
    def mean(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(k(x, y) for x in a for y in b) / (len(a) * len(b))

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


def nst(student: np.ndarray, teacher: np.ndarray, kernel: str = "polynomial") -> float:
    """Mean over the samples; maps (N, C, P) of equally many positions, float64."""
    total = 0.0
    for s_map, t_map in zip(student, teacher, strict=True):
        s, t = [unit(c) for c in s_map], [unit(c) for c in t_map]
        if kernel == "linear":
            total += mmd(s, t, dot)
        elif kernel == "polynomial":
            total += mmd(s, t, lambda a, b: dot(a, b) ** 2)
        else:
            both = s + t
            variance = sum(gap(a, b) for a in both for b in both) / len(both) ** 2 or 1.0
            total += mmd(s, t, lambda a, b, v=variance: math.exp(-gap(a, b) / (2 * v)))
    return total / len(student)


def average_pool(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, C, H, W) to a size that divides H and W."""
    n, c, h, w = maps.shape
    out = np.zeros((n, c, height, width))
    for i in range(height):
        for j in range(width):
            block = maps[:, :, i * h // height : (i + 1) * h // height, j * w // width : (j + 1) * w // width]
            out[:, :, i, j] = block.mean((2, 3))
    return out
