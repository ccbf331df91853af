"""Rank order preservation in loops over pairs of retrieved rows."""

import math

import numpy as np

from tests.oracles.csd import nearest
from tests.oracles.vectors import cosine, softmax


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def rop(
    student: np.ndarray, teacher: np.ndarray, top_k: int = 96, temperature: float = 0.1, rank_weight: float = 0.2
) -> float:
    total = 0.0
    for i, s in enumerate(student):
        near = nearest(teacher, i, top_k)
        t, x = ([cosine(row, teacher[j]) for j in near] for row in (teacher[i], s))
        weights = softmax([rank_weight * v for v in t])
        for a, b in np.ndindex(len(near), len(near)):
            gap = logistic((t[b] - t[a]) / 1e-6) - logistic((x[b] - t[a]) / temperature)
            total += (a + 1) * weights[a] * gap**2 / len(near)
    return total / len(student)
