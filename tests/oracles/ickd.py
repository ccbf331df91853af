"""Inter-channel correlation by plain loops: convolution, batch normalisation, Gram matrix, unit rows."""

import math

import numpy as np


def embed(maps: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """A 1 x 1 convolution with ``weight`` (C_t, C_s) on (N, C_s, P), then batch normalisation, unit scale, no shift."""
    n, _, p = maps.shape
    out = np.zeros((n, len(weight), p))
    for i in range(n):
        for c in range(len(weight)):
            for x in range(p):
                out[i, c, x] = sum(float(w) * float(v) for w, v in zip(weight[c], maps[i, :, x], strict=True))
    for c in range(len(weight)):
        values = out[:, c].reshape(-1)
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        out[:, c] = (out[:, c] - mean) / math.sqrt(variance + eps)
    return out


def correlation(channels: np.ndarray) -> list[list[float]]:
    """Rows of the Gram matrix of one sample's channels (C, P), each of length 1 (or 0)."""
    gram = [[sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) for b in channels] for a in channels]
    rows = []
    for row in gram:
        length = math.sqrt(sum(v * v for v in row))
        rows.append([v / length if length > 0 else 0.0 for v in row])
    return rows


def ickd(student: np.ndarray, teacher: np.ndarray) -> float:
    """Of embedded (N, C, P_s) and (N, C, P_t)."""
    n, c = student.shape[:2]
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for a, b in zip(correlation(s), correlation(t), strict=True):
            total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return total / (n * c)
