"""DarkRank, query by query: the likelihood of the teacher's list, and the divergence over all orders of it."""

import itertools
import math

import numpy as np


def _score(x: np.ndarray, i: int, j: int, alpha: float, beta: float) -> float:
    return -alpha * math.dist(x[i], x[j]) ** beta


def _lists(teacher: np.ndarray, length: int) -> list[list[int]]:
    n = len(teacher)
    return [
        sorted((j for j in range(n) if j != i), key=lambda j, i=i: math.dist(teacher[i], teacher[j]))[:length]
        for i in range(n)
    ]


def _log_probability(scores: list[float]) -> float:
    """Of drawing the list in its order: each entry against itself and all that come later."""
    total = 0.0
    for place, score in enumerate(scores):
        largest = max(scores[place:])
        total += score - largest - math.log(sum(math.exp(s - largest) for s in scores[place:]))
    return total


def hard(student: np.ndarray, teacher: np.ndarray, alpha: float = 3, beta: float = 3, length: int = 4) -> float:
    """Mean negative log-likelihood of the teacher's lists."""
    total = 0.0
    for i, near in enumerate(_lists(teacher, length)):
        total -= _log_probability([_score(student, i, j, alpha, beta) for j in near])
    return total / len(student)


def soft(student: np.ndarray, teacher: np.ndarray, alpha: float = 3, beta: float = 3, length: int = 4) -> float:
    """Mean Kullback-Leibler divergence of the distributions over all orders of the teacher's lists."""
    total = 0.0
    for i, near in enumerate(_lists(teacher, length)):
        for order in itertools.permutations(near):
            log_p = _log_probability([_score(teacher, i, j, alpha, beta) for j in order])
            log_q = _log_probability([_score(student, i, j, alpha, beta) for j in order])
            total += math.exp(log_p) * (log_p - log_q)
    return total / len(student)
