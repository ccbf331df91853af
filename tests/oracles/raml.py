"""Absolute and relational terms of RAML, pair by pair."""

import numpy as np

from tests.oracles.vectors import cosine


def raml(student: np.ndarray, teacher: np.ndarray, lambda1: float = 0.7482, lambda2: float = 0.6778) -> float:
    n, eps, total = len(student), 1e-6, 0.0
    for i, j in np.ndindex(n, n):
        own = cosine(teacher[i], teacher[j])
        if i == j:
            total += (1 - cosine(student[i], teacher[i]) + eps) ** 2 / n
        else:
            total += lambda1 * (cosine(student[i], teacher[j]) - own + eps) ** 2 / (n * (n - 1))
            total += lambda2 * (cosine(student[i], student[j]) - own + eps) ** 2 / (n * (n - 1))
    return total
