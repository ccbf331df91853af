"""Hinton's soft targets in loops: divergence of softened probabilities, times the temperature squared."""

import math

import numpy as np


def softmax(z: np.ndarray, temperature: float) -> list[float]:
    top = max(float(v) for v in z) / temperature
    e = [math.exp(float(v) / temperature - top) for v in z]
    return [v / sum(e) for v in e]


def soft_target(student: np.ndarray, teacher: np.ndarray, temperature: float = 4.0) -> float:
    """Mean over the rows of (N, K)."""
    total = 0.0
    for zs, zt in zip(student, teacher, strict=True):
        p, q = softmax(zt, temperature), softmax(zs, temperature)
        total += sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(len(p)))
    return temperature**2 * total / len(student)


def dense_soft_target(student: np.ndarray, teacher: np.ndarray, temperature: float = 4.0) -> float:
    """Mean over the pixels of (N, K, H, W)."""
    n, _, h, w = student.shape
    places = [(i, y, x) for i in range(n) for y in range(h) for x in range(w)]
    pixels = [np.stack([z[i, :, y, x] for i, y, x in places]) for z in (student, teacher)]
    return soft_target(pixels[0], pixels[1], temperature)
