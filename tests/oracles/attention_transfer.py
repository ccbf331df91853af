"""Attention transfer in loops over samples and places."""

import numpy as np

from tests.oracles.vectors import squares, unit


def attention(features: np.ndarray, power: float) -> list[float]:
    """Of one sample (C, H, W)."""
    channels, h, w = features.shape
    return unit([sum(abs(features[c, y, x]) ** power for c in range(channels)) for y in range(h) for x in range(w)])


def attention_transfer(student: np.ndarray, teacher: np.ndarray, power: float = 2.0) -> float:
    """Of one pair of maps (N, C, H, W) of one spatial size."""
    places = student.shape[2] * student.shape[3]
    total = sum(squares(attention(s, power), attention(t, power)) for s, t in zip(student, teacher, strict=True))
    return total / (len(student) * places)
