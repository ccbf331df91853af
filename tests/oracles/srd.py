"""SRD in loops: standardise every column, sum the fourth powers of the differences, take the logarithm."""

import math

import numpy as np

from tests.oracles.vectors import dot, standardised


def srd(
    student: np.ndarray, teacher: np.ndarray, parameters: dict[str, np.ndarray], power: float = 4.0, eps: float = 1e-5
) -> float:
    """With the projector's (D_t, D_s) weight."""
    projected = np.array([[dot(row, s) for row in parameters["project.weight"]] for s in student])
    columns = zip(projected.T, teacher.T, strict=True)
    pairs = [(standardised(a, 1e-4), standardised(b, 1e-4)) for a, b in columns]
    return math.log(eps + sum(abs(x - y) ** power for a, b in pairs for x, y in zip(a, b, strict=True)))
