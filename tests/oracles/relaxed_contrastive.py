"""Relaxed contrastive loss, pair by pair."""

import math

import numpy as np

from tests.oracles.vectors import unit


def relaxed_contrastive(student: np.ndarray, teacher: np.ndarray, sigma: float = 1, delta: float = 1) -> float:
    """Pairs weighted by the similarity of the teacher's unit rows; distances in units of each row's mean."""
    n = len(student)
    teacher = [unit(row) for row in teacher]
    total = 0.0
    for i in range(n):
        mean = sum(math.dist(student[i], student[m]) for m in range(n)) / n
        for j in range(n):
            if i == j:
                continue
            d = math.dist(student[i], student[j]) / mean if mean > 0 else 0.0
            w = math.exp(-(math.dist(teacher[i], teacher[j]) ** 2) / sigma)
            total += w * d**2 + (1 - w) * max(0.0, delta - d) ** 2
    return total / n
