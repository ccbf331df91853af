"""Probabilistic knowledge transfer, pair by pair: as in the authors' code, and over distinct pairs as in the paper."""

import math

import numpy as np

from tests.oracles.vectors import dot

EPS = 1e-7


def pkt(student: np.ndarray, teacher: np.ndarray, reduction: str = "official") -> float:
    """Kullback-Leibler divergence of the neighbourhood probabilities, mean over pairs."""
    n = len(student)
    pairs = [(i, j) for i in range(n) for j in range(n) if reduction == "official" or i != j]

    def probabilities(x: np.ndarray) -> dict[tuple[int, int], float]:
        norm = [math.sqrt(dot(row, row)) + EPS for row in x]

        def kernel(i: int, j: int) -> float:
            return (dot(x[i], x[j]) / (norm[i] * norm[j]) + 1) / 2

        return {(i, j): kernel(i, j) / sum(kernel(i, m) for a, m in pairs if a == i) for i, j in pairs}

    p, q = probabilities(teacher), probabilities(student)
    total = sum(p[pair] * math.log((p[pair] + EPS) / (q[pair] + EPS)) for pair in pairs)
    return total / max(1, len(pairs))
