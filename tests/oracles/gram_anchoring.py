"""Cosines between the tokens of an image, pair by pair."""

import numpy as np

from tests.oracles.vectors import cosine


def gram_anchoring(students: list[np.ndarray], teachers: list[np.ndarray], negative_cosines: str = "zero") -> float:
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        images, tokens, _ = student.shape
        for n, i, j in np.ndindex(images, tokens, tokens):
            s, t = (cosine(x[n, i], x[n, j]) for x in (student, teacher))
            if s < 0 and (negative_cosines == "zero" or (negative_cosines == "teacher" and t < 0)):
                s = 0.0
            if t < 0 and negative_cosines != "keep":
                t = 0.0
            total += (s - t) ** 2 / (images * tokens**2)
    return total
