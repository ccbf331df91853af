"""Sample-wise contrastive distillation in loops: each teacher row against all student rows."""

import math

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = math.sqrt(sum(float(v) ** 2 for v in a)) * math.sqrt(sum(float(v) ** 2 for v in b))
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True)) / lengths if lengths > 0 else 0.0


def sample_contrastive(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> float:
    total = 0.0
    for i, t in enumerate(teacher):
        scores = [math.exp(cosine(t, s) / temperature) for s in student]
        total -= math.log(scores[i] / sum(scores))
    return total / len(teacher)
