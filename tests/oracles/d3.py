"""Decoupled differential distillation in loops over pairs of retrieved rows."""

import math

import numpy as np

from tests.oracles.csd import nearest
from tests.oracles.vectors import cosine


def d3(
    student: np.ndarray,
    teacher: np.ndarray,
    top_k: int = 10,
    alpha: float = 50.0,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> float:
    n, total, own = len(student), 0.0, 0.0
    for i, s in enumerate(student):
        near = nearest(teacher, i, top_k)
        t, x = ([cosine(row, teacher[j]) for j in near] for row in (teacher[i], s))
        own += (t[0] - x[0]) ** 2
        wrong = right = 0.0
        for a, b in np.ndindex(len(near), len(near)):
            dt, dx = t[a] - t[b], x[a] - x[b]
            if min(a, b) > 0 and dt * dx:
                gap = ((dx - dt) / (0.1 + abs(dt))) ** 2
                wrong, right = (wrong + gap, right) if dt * dx < 0 else (wrong, right + gap)
        total += (beta * math.sqrt(wrong) + gamma * math.sqrt(right)) / (n * (top_k - 1))
    return alpha * math.sqrt(own) / n + total
