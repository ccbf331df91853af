"""Tanimoto distillation, pair by pair."""

import numpy as np


def coefficient(a: np.ndarray, b: np.ndarray) -> float:
    """a.b / (|a|^2 + |b|^2 - a.b); two zero vectors are equal."""
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    union = sum(x * x for x in a) + sum(y * y for y in b) - inner
    return inner / union if union > 0 else 1.0


def matrix(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean squared difference of the coefficients of all pairs."""
    n = len(student)
    return (
        sum(
            (coefficient(student[i], student[j]) - coefficient(teacher[i], teacher[j])) ** 2
            for i in range(n)
            for j in range(n)
        )
        / n**2
    )


def sample(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean over samples of one minus the coefficient of the two embeddings."""
    return sum(1 - coefficient(s, t) for s, t in zip(student, teacher, strict=True)) / len(student)
