"""SRD in loops: standardise every column, sum the fourth powers of the differences, take the logarithm."""

import math

import numpy as np


def standardised(x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    for d in range(x.shape[1]):
        column = [float(v) for v in x[:, d]]
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        out[:, d] = [(v - mean) / math.sqrt(variance + 1e-4) for v in column]
    return out


def srd(student: np.ndarray, teacher: np.ndarray, weight: np.ndarray, power: float = 4.0, eps: float = 1e-5) -> float:
    """With the projector's (D_t, D_s) weight."""
    projected = np.array([[sum(w * v for w, v in zip(row, s, strict=True)) for row in weight] for s in student])
    a, b = standardised(projected), standardised(teacher)
    n, d = teacher.shape
    return math.log(eps + sum(abs(float(a[i, j] - b[i, j])) ** power for i in range(n) for j in range(d)))
