"""Attention transfer in loops over samples and places."""

import math

import numpy as np


def attention(features: np.ndarray, power: float) -> list[float]:
    """Of one sample (C, H, W)."""
    channels, h, w = features.shape
    q = [sum(abs(float(features[c, y, x])) ** power for c in range(channels)) for y in range(h) for x in range(w)]
    length = math.sqrt(sum(v * v for v in q))
    return [v / length if length > 0 else 0.0 for v in q]


def attention_transfer(student: np.ndarray, teacher: np.ndarray, power: float = 2.0) -> float:
    """Of one pair of maps (N, C, H, W) of one spatial size."""
    total, places = 0.0, student.shape[2] * student.shape[3]
    for s, t in zip(student, teacher, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(attention(s, power), attention(t, power), strict=True))
    return total / (len(student) * places)


def half(features: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 places."""
    n, c, h, w = features.shape
    out = np.zeros((n, c, h // 2, w // 2))
    for y in range(h // 2):
        for x in range(w // 2):
            out[:, :, y, x] = sum(features[:, :, 2 * y + a, 2 * x + b] for a in (0, 1) for b in (0, 1)) / 4
    return out
