"""Sample-wise contrastive distillation in loops: each teacher row against all student rows."""

import math

import numpy as np

from tests.oracles.vectors import cosine, softmax


def sample_contrastive(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> float:
    scores = [softmax([cosine(t, s) for s in student], temperature) for t in teacher]
    return -sum(math.log(row[i]) for i, row in enumerate(scores)) / len(teacher)
