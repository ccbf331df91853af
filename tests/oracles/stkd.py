"""The reconstruction of similarity transfer as its docstring writes it, sample by sample."""

import math
from collections.abc import Sequence

import numpy as np


def softmax(z: Sequence[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def cross_entropy(z: Sequence[float], y: int) -> float:
    return math.log(sum(math.exp(v) for v in z)) - z[y]


def stkd(
    student: np.ndarray,
    teacher: np.ndarray,
    ratio: Sequence[float],
    partners: Sequence[int],
    labels: Sequence[int],
    form: str = "virtual",
    share: float = 0.9,
    temperature: float = 4.0,
) -> float:
    """L of float64 logits (N, K); ``teacher`` holds the logits for unmixed samples where the target is blended."""
    n, total = len(student), 0.0
    for i in range(n):
        y, other, part = labels[i], labels[partners[i]], ratio[i]
        task = part * cross_entropy(student[i], y) + (1 - part) * cross_entropy(student[i], other)
        classes = range(student.shape[1])
        if form == "blended":
            own = softmax([v / temperature for v in teacher[i]])
            its = softmax([v / temperature for v in teacher[partners[i]]])
            p = [part * a + (1 - part) * b for a, b in zip(own, its, strict=True)]
        else:
            if form == "wrong classes":
                classes = [c for c in classes if c not in (y, other)]
            p = softmax([teacher[i][c] / temperature for c in classes])
        q = softmax([student[i][c] / temperature for c in classes])
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += (1 - share) * task + share * temperature**2 * divergence
    return total / n
