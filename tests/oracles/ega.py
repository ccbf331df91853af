"""Embedding graph alignment, correlation by correlation."""

import math

import numpy as np

from tests.oracles.vectors import Row, dot, unit


def pearson(a: Row, b: Row) -> float:
    """0 where the entries of a row are equal."""
    centred = [[x - math.fsum(row) / len(row) for x in row] for row in (a, b)]
    return dot(*(unit(row if max(map(abs, row)) > 1e-12 else [0.0] * len(row)) for row in centred))


def ega(student: np.ndarray, teacher: np.ndarray, node_weight: float = 1.0, edge_weight: float = 0.3) -> float:
    nodes = edges = 0.0
    for i, j in np.ndindex(len(student), len(student)):
        nodes += (pearson(student[i], teacher[j]) - (i == j)) ** 2
        edges += (pearson(teacher[i], teacher[j]) - pearson(student[i], student[j])) ** 2
    return node_weight * math.sqrt(nodes) + edge_weight * math.sqrt(edges)
