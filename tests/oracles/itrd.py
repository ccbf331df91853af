"""Information theoretic distillation by plain loops over columns and pairs of samples."""

import math
import statistics

import numpy as np


def correlation_loss(student: np.ndarray, teacher: np.ndarray, alpha: float) -> float:
    n, total = len(student), 0.0
    for s, t in zip(student.T.tolist(), teacher.T.tolist(), strict=True):
        a, b = statistics.stdev(s), statistics.stdev(t)
        ms, mt = sum(s) / n, sum(t) / n
        c = sum((x - ms) / a * (y - mt) / b for x, y in zip(s, t, strict=True)) / n if a * b > 0 else 0.0
        total += ((c - 1) ** 2) ** alpha
    return math.log2(total)


def cosines(x: np.ndarray) -> list[list[float]]:
    lengths = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in x]
    return [
        [sum(float(p) * float(q) for p, q in zip(x[i], x[j], strict=True)) / (lengths[i] * lengths[j])
         for j in range(len(x))]
        for i in range(len(x))
    ]  # fmt: skip


def mutual_information_loss(student: np.ndarray, teacher: np.ndarray) -> float:
    n, s, t = len(student), cosines(student), cosines(teacher)
    st = [[s[i][j] * t[i][j] for j in range(n)] for i in range(n)]
    trace_s, trace_st = sum(s[i][i] for i in range(n)), sum(st[i][i] for i in range(n))
    return sum((s[i][j] / trace_s) ** 2 - (st[i][j] / trace_st) ** 2 for i in range(n) for j in range(n))
