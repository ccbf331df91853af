"""Information theoretic distillation by plain loops over columns and pairs of samples."""

import math
import statistics

import numpy as np

from tests.oracles.vectors import cosine, linear


def correlation_loss(student: np.ndarray, teacher: np.ndarray, alpha: float) -> float:
    n, total = len(student), 0.0
    for s, t in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
        a, b = statistics.stdev(s), statistics.stdev(t)
        ms, mt = sum(s) / n, sum(t) / n
        c = sum((x - ms) / a * (y - mt) / b for x, y in zip(s, t, strict=True)) / n if a * b > 0 else 0.0
        total += ((c - 1) ** 2) ** alpha
    return math.log2(total)


def mutual_information_loss(student: np.ndarray, teacher: np.ndarray) -> float:
    n = len(student)
    s, t = ([[cosine(a, b) for b in x] for a in x] for x in (student, teacher))
    st = [[s[i][j] * t[i][j] for j in range(n)] for i in range(n)]
    trace_s, trace_st = sum(s[i][i] for i in range(n)), sum(st[i][i] for i in range(n))
    return sum((s[i][j] / trace_s) ** 2 - (st[i][j] / trace_st) ** 2 for i in range(n) for j in range(n))


def itrd(
    student: np.ndarray,
    teacher: np.ndarray,
    parameters: dict[str, np.ndarray],
    correlation_weight: float = 2.0,
    mutual_weight: float = 0.05,
    alpha: float = 1.5,
) -> float:
    """The second term takes the mapped student only where the widths differ."""
    mapped = np.array([linear(parameters["embed.weight"], parameters["embed.bias"], s) for s in student])
    second = mutual_information_loss(student if student.shape == teacher.shape else mapped, teacher)
    return correlation_weight * correlation_loss(mapped, teacher, alpha) + mutual_weight * second
