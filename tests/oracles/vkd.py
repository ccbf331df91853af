"""VkD by plain loops: Gram-Schmidt, layer norm, smooth L1."""

import math

import numpy as np


def gram_schmidt(columns: list[list[float]]) -> list[list[float]]:
    """Orthonormal columns that span the same flags."""
    basis: list[list[float]] = []
    for column in columns:
        rest = list(column)
        for q in basis:
            overlap = sum(x * y for x, y in zip(q, column, strict=True))
            rest = [x - overlap * y for x, y in zip(rest, q, strict=True)]
        length = math.sqrt(sum(x * x for x in rest))
        basis.append([x / length for x in rest])
    return basis


def projection(matrix: np.ndarray) -> np.ndarray:
    """(D_t, D_s) with orthonormal columns, or rows where it is wide."""
    if matrix.shape[0] < matrix.shape[1]:
        return projection(matrix.T).T
    return np.array(gram_schmidt(matrix.T.tolist())).T


def vkd(student: np.ndarray, teacher: np.ndarray, parameters: dict[str, np.ndarray]) -> float:
    p, total = projection(parameters["matrix"]), 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        mean = sum(t) / len(t)
        spread = math.sqrt(sum((x - mean) ** 2 for x in t) / len(t) + 1e-5)
        for d, row in enumerate(p.tolist()):
            e = sum(w * x for w, x in zip(row, s, strict=True)) - (t[d] - mean) / spread
            total += e * e / 2 if abs(e) <= 1 else abs(e) - 0.5
    return total / teacher.size
