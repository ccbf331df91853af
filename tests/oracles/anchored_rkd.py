"""Distances and angles between the student's rows and the teacher's, tuple by tuple."""

import math

import numpy as np

from tests.oracles.vectors import Row, dot, squares, unit


def huber(e: float) -> float:
    return e * e / 2 if abs(e) <= 1 else abs(e) - 0.5


def angle(corner: Row, vertex: Row, other: Row) -> float:
    """The cosine at the vertex, from unit vectors to the corners."""
    return dot(*(unit([a - b for a, b in zip(end, vertex, strict=True)]) for end in (corner, other)))


def anchored_rkd(
    student: np.ndarray, teacher: np.ndarray, distance_weight: float = 1.0, angle_weight: float = 0.0
) -> float:
    s, t, n = [unit(x) for x in student], [unit(x) for x in teacher], len(student)
    own = [[math.sqrt(squares(a, b)) for b in t] for a in t]
    positive = [d for row in own for d in row if d > 1e-6]
    mean = math.fsum(positive) / len(positive) if positive else 1.0
    total = 0.0
    for i, j in np.ndindex(n, n):
        total += distance_weight * huber((math.sqrt(squares(s[i], t[j])) - own[i][j]) / mean) / n**2
    for i, j, k in np.ndindex(n, n, n):
        if len({i, j, k}) == 3 and min(own[i][j], own[i][k], *(math.dist(s[i], t[x]) for x in (j, k))) > 1e-6:
            gap = angle(t[j], s[i], t[k]) - angle(t[j], t[i], t[k])
            total += angle_weight * huber(gap) / (n * (n - 1) * (n - 2))
    return total
