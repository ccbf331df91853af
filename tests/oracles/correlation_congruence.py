"""Correlation congruence, pair by pair: the paper's kernel form, torchdistill's and RepDistiller's."""

import math

import numpy as np


def _kernel(a: list[float], b: list[float], gamma: float, order: int) -> float:
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * inner**p for p in range(order + 1))


def _squares(student: list[list[float]], teacher: list[list[float]], gamma: float, order: int) -> float:
    n = len(student)
    return sum(
        (_kernel(student[i], student[j], gamma, order) - _kernel(teacher[i], teacher[j], gamma, order)) ** 2
        for i in range(n)
        for j in range(n)
    )


def kernel(student: np.ndarray, teacher: np.ndarray, gamma: float = 0.4, order: int = 2) -> float:
    """Unit rows, mean of squares."""

    def unit(x: np.ndarray) -> list[list[float]]:
        lengths = [math.sqrt(sum(v * v for v in row)) for row in x]
        return [[v / length if length > 0 else 0.0 for v in row] for row, length in zip(x, lengths, strict=True)]

    return _squares(unit(student), unit(teacher), gamma, order) / len(student) ** 2


def norm(student: np.ndarray, teacher: np.ndarray, gamma: float = 0.4, order: int = 2) -> float:
    """Rows as given, root of the sum of squares, over N^2."""
    return math.sqrt(_squares(student.tolist(), teacher.tolist(), gamma, order)) / len(student) ** 2


def rows(student: np.ndarray, teacher: np.ndarray) -> float:
    """Products of the absolute differences of neighbouring rows."""
    n, width = student.shape
    total = 0.0
    for i in range(n - 1):
        for d in range(width):
            total += abs(student[i, d] - teacher[i, d]) * abs(student[i + 1, d] - teacher[i + 1, d])
    return total / (n - 1)
