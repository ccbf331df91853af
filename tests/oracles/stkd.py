"""The reconstruction of similarity transfer as its docstring writes it, sample by sample."""

import math
from collections.abc import Sequence

import numpy as np

from tests.oracles.vectors import divergence, softmax


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
        own = softmax(student[i])
        task = -part * math.log(own[y]) - (1 - part) * math.log(own[other])
        classes = range(student.shape[1])
        if form == "blended":
            both = softmax(teacher[i], temperature), softmax(teacher[partners[i]], temperature)
            p = [part * a + (1 - part) * b for a, b in zip(*both, strict=True)]
        else:
            if form == "wrong classes":
                classes = [c for c in classes if c not in (y, other)]
            p = softmax([teacher[i][c] for c in classes], temperature)
        q = softmax([student[i][c] for c in classes], temperature)
        total += (1 - share) * task + share * temperature**2 * divergence(p, q)
    return total / n
