"""DIST in loops: Pearson's correlation of every row and of every column, 1e-8 added to the denominator."""

import math

import numpy as np

from tests.oracles.vectors import softmax


def pearson(a: list[float], b: list[float]) -> float:
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    ca, cb = [v - ma for v in a], [v - mb for v in b]
    lengths = math.sqrt(sum(v * v for v in ca)) * math.sqrt(sum(v * v for v in cb))
    return sum(u * v for u, v in zip(ca, cb, strict=True)) / (lengths + 1e-8)


def dist(
    student: np.ndarray,
    teacher: np.ndarray,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
) -> float:
    n, k = student.shape
    ps, pt = ([softmax(z, temperature) for z in network] for network in (student, teacher))
    inter = 1 - sum(pearson(ps[i], pt[i]) for i in range(n)) / n
    intra = 1 - sum(pearson([row[j] for row in ps], [row[j] for row in pt]) for j in range(k)) / k
    return temperature**2 * (inter_weight * inter + intra_weight * intra)
