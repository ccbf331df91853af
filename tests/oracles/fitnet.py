"""Hints in loops: a 1 x 1 convolution, batch normalisation and ReLU where wanted, then the mean squared error."""

import numpy as np

from tests.oracles.vectors import dot, squares, standardised

Parameters = dict[str, np.ndarray]


def hint(student: np.ndarray, teacher: np.ndarray, own: Parameters, relu: bool = False, norm: bool = False) -> float:
    """Of one pair of maps (N, C, H, W), with the regressor's weight (C_t, C_s) and bias (C_t,), and the norm's."""
    places, total = [(i, y, x) for i in range(len(teacher)) for y, x in np.ndindex(*teacher.shape[2:])], 0.0
    for c in range(teacher.shape[1]):
        values = [dot(own["weight"][c], student[i, :, y, x]) + own["bias"][c] for i, y, x in places]
        if norm:
            values = [own["norm weight"][c] * v + own["norm bias"][c] for v in standardised(values, 1e-5)]
        predicted = [max(v, 0.0) if relu else v for v in values]
        total += squares(predicted, [teacher[i, c, y, x] for i, y, x in places])
    return total / teacher.size


def hints(
    students: list[np.ndarray], teachers: list[np.ndarray], parameters: Parameters, relu: bool = False,
    norm: bool = False,
) -> float:  # fmt: skip
    """Sum over pairs of maps."""
    total = 0.0
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        own = {name: parameters[f"regressors.{i}.{name}"] for name in ("weight", "bias")}
        own |= {f"norm {name}": parameters[f"norms.{i}.{name}"] for name in ("weight", "bias") if norm}
        total += hint(s, t, own, relu, norm)
    return total
