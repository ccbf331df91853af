"""Transformed teacher matching in loops: powers of probabilities, as the paper writes them."""

import numpy as np

from tests.oracles.vectors import divergence, softmax


def ttm(student: np.ndarray, teacher: np.ndarray, exponent: float = 0.1, weighted: bool = False) -> float:
    total = 0.0
    for zs, zt in zip(student, teacher, strict=True):
        powers = [p**exponent for p in softmax(zt)]
        distance = divergence([p / sum(powers) for p in powers], softmax(zs))
        total += sum(powers) * distance if weighted else distance
    return total / len(student)


def wttm(student: np.ndarray, teacher: np.ndarray, exponent: float = 0.1) -> float:
    return ttm(student, teacher, exponent, weighted=True)
