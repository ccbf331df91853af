"""Similarity-preserving distillation as written in the paper: row-normalised Gram matrices, entry by entry."""

import math

import numpy as np


def similarity_preserving(students: list[np.ndarray], teachers: list[np.ndarray]) -> float:
    """Sum over pairs of layers, each (N, ...), of ||G_t - G_s||_F^2 / N^2."""

    def gram(layer: np.ndarray) -> list[list[float]]:
        rows = [list(sample.ravel()) for sample in layer]
        g = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
        lengths = [math.sqrt(sum(v * v for v in row)) for row in g]
        return [[v / length if length > 0 else 0.0 for v in row] for row, length in zip(g, lengths, strict=True)]

    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        n, s, t = len(student), gram(student), gram(teacher)
        total += sum((t[i][j] - s[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2
    return total
