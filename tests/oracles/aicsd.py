"""Inter-class similarity in loops over images and pairs of classes."""

import math

import numpy as np

from tests.oracles.soft_target import softmax


def similarity_rows(logits: np.ndarray) -> list[list[float]]:
    """Of one image (K, H, W): divergences between the spatial distributions of its classes, rows of length 1."""
    q = [softmax(z.reshape(-1), 1.0) for z in logits]
    rows = []
    for a in q:
        row = [sum(u * math.log(u / v) for u, v in zip(a, b, strict=True)) for b in q]
        length = math.sqrt(sum(v * v for v in row))
        rows.append([v / length if length > 0 else 0.0 for v in row])
    return rows


def aicsd(student: np.ndarray, teacher: np.ndarray) -> float:
    n, k = student.shape[:2]
    total = 0.0
    for zs, zt in zip(student, teacher, strict=True):
        s, t = similarity_rows(zs), similarity_rows(zt)
        total += sum((s[a][b] - t[a][b]) ** 2 for a in range(k) for b in range(k))
    return total / (n * k * k)
