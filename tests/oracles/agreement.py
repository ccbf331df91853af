"""Agreement of two geometries by plain loops and scipy."""

import math
from collections.abc import Sequence

from scipy.stats import spearmanr

Rows = Sequence[Sequence[float]]


def neighbour_overlap(student: Rows, teacher: Rows, k: int) -> float:
    n = len(student)

    def near(rows: Rows, a: int) -> set[int]:
        return set(sorted((b for b in range(n) if b != a), key=lambda b: (math.dist(rows[a], rows[b]), b))[:k])

    return sum(len(near(student, a) & near(teacher, a)) / k for a in range(n)) / n


def distance_correlation(student: Rows, teacher: Rows) -> float:
    n, total = len(student), 0.0
    for a in range(n):
        s, t = ([math.dist(rows[a], rows[b]) for b in range(n) if b != a] for rows in (student, teacher))
        if len(set(s)) > 1 and len(set(t)) > 1:
            total += float(spearmanr(s, t).statistic)
    return total / n


def angle(rows: Rows, i: int, j: int, k: int) -> float:
    u, v = ([x - y for x, y in zip(rows[end], rows[j], strict=True)] for end in (i, k))
    lengths = math.hypot(*u) * math.hypot(*v)
    cosine = sum(x * y for x, y in zip(u, v, strict=True)) / lengths if lengths else 0.0
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def angle_gap(student: Rows, teacher: Rows, triplets: Sequence[tuple[int, int, int]]) -> float:
    return sum(abs(angle(student, *t) - angle(teacher, *t)) for t in triplets) / len(triplets)
