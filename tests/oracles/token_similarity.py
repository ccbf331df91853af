"""Similarities of each token to those of its image, as distributions."""

import numpy as np

from tests.oracles.vectors import cosine, divergence, softmax


def token_similarity(students: list[np.ndarray], teachers: list[np.ndarray], temperature: float = 0.07) -> float:
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        for s, t in zip(student, teacher, strict=True):
            for i in range(len(s)):
                q, p = (softmax([cosine(x[i], other) for other in x], temperature) for x in (s, t))
                total += divergence(p, q) / (len(student) * len(s))
    return total
