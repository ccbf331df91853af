"""Similarity-preserving distillation as written in the paper: row-normalised Gram matrices, entry by entry."""

import numpy as np

from tests.oracles.vectors import dot, squares, unit


def gram(layer: np.ndarray) -> list[list[float]]:
    return [unit([dot(x.flat, y.flat) for y in layer]) for x in layer]


def similarity_preserving(students: list[np.ndarray], teachers: list[np.ndarray]) -> float:
    """Sum over pairs of layers, each (N, ...), of ||G_t - G_s||_F^2 / N^2."""
    return sum(
        squares(a, b) / len(s) ** 2
        for s, t in zip(students, teachers, strict=True)
        for a, b in zip(gram(s), gram(t), strict=True)
    )
