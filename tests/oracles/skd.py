"""The direction term of streamlined knowledge distillation, sample by sample."""

import math

import numpy as np

from tests.oracles.vectors import cosine


def direction(student: np.ndarray, teacher: np.ndarray, tikhonov: float = 0.1) -> float:
    n = len(student)
    gaps, spread = np.zeros((n, n)), np.zeros((n, n))
    for i, j in np.ndindex(n, n):
        gaps[i, j] = cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])
    for i, j in np.ndindex(n, n):
        a, b = gaps[:, i] - gaps[:, i].mean(), gaps[:, j] - gaps[:, j].mean()
        spread[i, j] = math.fsum(a * b) / max(1, n - 1) + (tikhonov if i == j else 0)
    inverse = np.linalg.inv(spread)
    return math.fsum(math.sqrt(max(0.0, row @ inverse @ row)) for row in gaps) / n
