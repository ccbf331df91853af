"""Tanimoto distillation, pair by pair."""

import numpy as np

from tests.oracles.vectors import dot


def coefficient(a: np.ndarray, b: np.ndarray) -> float:
    """a.b / (|a|^2 + |b|^2 - a.b); two zero vectors are equal."""
    union = dot(a, a) + dot(b, b) - dot(a, b)
    return dot(a, b) / union if union > 0 else 1.0


def tanimoto(student: np.ndarray, teacher: np.ndarray, form: str = "matrix") -> float:
    """Mean squared difference of all pairs' coefficients, or mean of 1 - the two embeddings' coefficient."""
    n = len(student)
    if form == "sample":
        return sum(1 - coefficient(s, t) for s, t in zip(student, teacher, strict=True)) / n
    pairs = np.ndindex(n, n)
    return (
        sum((coefficient(student[i], student[j]) - coefficient(teacher[i], teacher[j])) ** 2 for i, j in pairs) / n**2
    )
