"""Hinton's soft targets in loops: divergence of softened probabilities, times the temperature squared."""

import numpy as np

from tests.oracles.vectors import divergence, softmax


def soft_target(student: np.ndarray, teacher: np.ndarray, temperature: float = 4.0) -> float:
    """Mean over the rows of (N, K)."""
    pairs = zip(student, teacher, strict=True)
    total = sum(divergence(softmax(zt, temperature), softmax(zs, temperature)) for zs, zt in pairs)
    return temperature**2 * total / len(student)
