"""Relative similarity over all pairs of pairs."""

import itertools

import numpy as np

from tests.oracles.vectors import cosine


def similarities(rows: np.ndarray) -> list[float]:
    return [cosine(rows[i], rows[j]) for i, j in itertools.combinations(range(len(rows)), 2)]


def relative_similarity(student: np.ndarray, teacher: np.ndarray, margin: float = 0.015) -> float:
    own, wanted = similarities(student), similarities(teacher)
    hinges = [
        max(0.0, (1 if wanted[b] - wanted[a] < 0 else -1) * (own[b] - own[a]) + margin)
        for a, b in itertools.combinations(range(len(own)), 2)
    ]
    return sum(hinges) / max(1, len(hinges))
