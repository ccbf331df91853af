"""Contextual similarity distillation in loops."""

import numpy as np

from tests.oracles.vectors import Rows, cosine, divergence, softmax


def nearest(teacher: Rows, i: int, top_k: int | None) -> list[int]:
    """Of the rows most similar to row i, the first is itself."""
    return sorted(range(len(teacher)), key=lambda j: -cosine(teacher[i], teacher[j]))[:top_k]


def csd(
    student: np.ndarray,
    teacher: np.ndarray,
    top_k: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 0.01,
) -> float:
    total = 0.0
    for i, s in enumerate(student):
        near = nearest(teacher, i, top_k)
        p = softmax([cosine(teacher[i], teacher[j]) for j in near], teacher_temperature)
        q = softmax([cosine(s, teacher[j]) for j in near], student_temperature)
        total += divergence([a for a in p if a > 0], [b for a, b in zip(p, q, strict=True) if a > 0])
    return total / len(student)
