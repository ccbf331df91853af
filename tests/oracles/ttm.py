"""Transformed teacher matching in loops: powers of probabilities, as the paper writes them."""

import math

import numpy as np

from tests.oracles.soft_target import softmax


def ttm(student: np.ndarray, teacher: np.ndarray, exponent: float = 0.1, weighted: bool = False) -> float:
    total = 0.0
    for zs, zt in zip(student, teacher, strict=True):
        q = softmax(zs, 1.0)
        powers = [p**exponent for p in softmax(zt, 1.0)]
        power_sum = sum(powers)
        divergence = sum(p / power_sum * math.log(p / power_sum / r) for p, r in zip(powers, q, strict=True))
        total += power_sum * divergence if weighted else divergence
    return total / len(student)
