"""Rows of numbers in plain Python: what the oracles share."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

Row = Sequence[float]
Rows = Sequence[Row]


def dot(a: Iterable[float], b: Iterable[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Row) -> list[float]:
    """Zeros stay zero."""
    length = math.sqrt(dot(a, a))
    return [float(x) / length if length > 0 else 0.0 for x in a]


def cosine(a: Row, b: Row) -> float:
    return dot(unit(a), unit(b))


def squares(a: Iterable[float], b: Iterable[float]) -> float:
    """Sum of squared differences."""
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def softmax(z: Row, temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((v - top) / temperature) for v in z]
    total = math.fsum(e)
    return [v / total for v in e]


def divergence(p: Row, q: Row) -> float:
    """Kullback-Leibler divergence of q from p."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def linear(weight: Rows, bias: Row, x: Row) -> list[float]:
    return [dot(w, x) + b for w, b in zip(weight, bias, strict=True)]


def project(weight: Rows, bias: Row, rows: Rows) -> list[list[float]]:
    return [unit(linear(weight, bias, x)) for x in rows]


def standardised(column: Row, eps: float) -> list[float]:
    """Minus the mean, over the root of the biased variance plus ``eps``."""
    mean = math.fsum(column) / len(column)
    variance = math.fsum((v - mean) ** 2 for v in column) / len(column)
    return [(v - mean) / math.sqrt(variance + eps) for v in column]


def average_pool(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, C, H, W) to a size that divides H and W."""
    n, c, h, w = maps.shape
    out = np.zeros((n, c, height, width))
    for i, j in np.ndindex(height, width):
        block = maps[:, :, i * h // height : (i + 1) * h // height, j * w // width : (j + 1) * w // width]
        out[:, :, i, j] = block.mean((2, 3))
    return out
