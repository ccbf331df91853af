"""Hints in loops: a 1 x 1 convolution, then the mean squared error."""

import numpy as np

from tests.oracles.vectors import dot


def hint(student: np.ndarray, teacher: np.ndarray, weight: np.ndarray, bias: np.ndarray, relu: bool = False) -> float:
    """Of one pair of maps (N, C, H, W), with the regressor's weight (C_t, C_s) and bias (C_t,)."""
    total = 0.0
    for i, c, y, x in np.ndindex(*teacher.shape):
        r = dot(weight[c], student[i, :, y, x]) + bias[c]
        total += float((max(r, 0.0) if relu else r) - teacher[i, c, y, x]) ** 2
    return total / teacher.size


def hints(
    students: list[np.ndarray], teachers: list[np.ndarray], parameters: dict[str, np.ndarray], relu: bool = False
) -> float:
    """Sum over pairs of maps."""
    return sum(
        hint(s, t, parameters[f"regressors.{i}.weight"], parameters[f"regressors.{i}.bias"], relu)
        for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    )
