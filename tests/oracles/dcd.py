"""Discriminative and consistent distillation, sample by sample."""

import math
from typing import Any

import numpy as np

from tests.oracles.vectors import divergence, dot, project, softmax


def dcd(
    student: np.ndarray,
    teacher: np.ndarray,
    parameters: dict[str, Any],
    alpha: float = 0.5,
    max_scale: float = 10.0,
    dim: int = 128,
) -> float:
    s, t = (
        project(parameters[f"{who}_projector.linear.weight"], parameters[f"{who}_projector.linear.bias"], rows)
        for who, rows in (("student", student), ("teacher", teacher))
    )
    scale, n, total = min(math.exp(parameters["log_scale"]), max_scale), len(student), 0.0
    for i in range(n):
        own = softmax([scale * dot(s[i], t[j]) for j in range(n)])
        back = softmax([scale * dot(s[j], t[i]) for j in range(n)])
        total += (alpha * divergence(back, own) - math.log(own[i])) / n
    return total
