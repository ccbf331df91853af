"""Contextual similarity distillation in loops."""

import numpy as np

from tests.oracles.vectors import Rows, cosine, divergence, softmax


def nearest(teacher: Rows, i: int, top_k: int | None, gallery: Rows | None = None) -> list[int]:
    """The rows of the gallery, which is the teacher's unless one is given, that are most similar to row i."""
    rows = teacher if gallery is None else gallery
    return sorted(range(len(rows)), key=lambda j: -cosine(teacher[i], rows[j]))[:top_k]


def csd(
    student: np.ndarray,
    teacher: np.ndarray,
    top_k: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 0.01,
    gallery: Rows | None = None,
) -> float:
    total, rows = 0.0, teacher if gallery is None else gallery
    for i, s in enumerate(student):
        near = nearest(teacher, i, top_k, gallery)
        p = softmax([cosine(teacher[i], rows[j]) for j in near], teacher_temperature)
        q = softmax([cosine(s, rows[j]) for j in near], student_temperature)
        total += divergence([a for a in p if a > 0], [b for a, b in zip(p, q, strict=True) if a > 0])
    return total / len(student)
