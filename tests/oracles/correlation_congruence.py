"""Correlation congruence, pair by pair: the paper's kernel form, torchdistill's and RepDistiller's."""

import math

import numpy as np

from tests.oracles.vectors import Row, Rows, dot, linear, unit


def _kernel(a: Row, b: Row, gamma: float, order: int) -> float:
    return sum(math.exp(-2 * gamma) * (2 * gamma * dot(a, b)) ** p / math.factorial(p) for p in range(order + 1))


def _squares(student: Rows, teacher: Rows, gamma: float, order: int) -> float:
    pairs = np.ndindex(len(student), len(student))
    gaps = [
        _kernel(student[i], student[j], gamma, order) - _kernel(teacher[i], teacher[j], gamma, order) for i, j in pairs
    ]
    return sum(gap**2 for gap in gaps)


def correlation_congruence(
    student: np.ndarray, teacher: np.ndarray, form: str = "kernel", gamma: float = 0.4, order: int = 2
) -> float:
    """Unit rows and the mean of squares; rows as given and the root of the sum of squares over N^2; or, with "rows",
    products of the absolute differences of neighbouring rows.
    """
    n = len(student)
    if form == "kernel":
        return _squares([unit(x) for x in student], [unit(x) for x in teacher], gamma, order) / n**2
    if form == "norm":
        return math.sqrt(_squares(student, teacher, gamma, order)) / n**2
    gaps = abs(student - teacher)
    return sum(dot(gaps[i], gaps[i + 1]) for i in range(n - 1)) / (n - 1)


def embedded(student: np.ndarray, teacher: np.ndarray, parameters: dict[str, np.ndarray], dim: int, form: str) -> float:
    """Behind a linear layer on either network."""
    rows = []
    for i, x in enumerate((student, teacher)):
        weight, bias = parameters[f"embed.{i}.weight"], parameters[f"embed.{i}.bias"]
        assert len(weight) == dim
        rows.append(np.array([linear(weight, bias, row) for row in x]))
    return correlation_congruence(*rows, form=form)
