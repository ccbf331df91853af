"""Inter-class similarity in loops over images and pairs of classes."""

import numpy as np

from tests.oracles.vectors import divergence, softmax, squares, unit


def similarity_rows(logits: np.ndarray) -> list[list[float]]:
    """Of one image (K, H, W): divergences between the spatial distributions of its classes, rows of unit norm."""
    q = [softmax(z.reshape(-1)) for z in logits]
    return [unit([divergence(a, b) for b in q]) for a in q]


def aicsd(student: np.ndarray, teacher: np.ndarray) -> float:
    n, k = student.shape[:2]
    pairs = [pair for zs, zt in zip(student, teacher, strict=True)
             for pair in zip(similarity_rows(zs), similarity_rows(zt), strict=True)]  # fmt: skip
    return sum(squares(*pair) for pair in pairs) / (n * k * k)
