"""Class similarity and cosine-weighted temperatures in loops."""

import numpy as np

from tests.oracles.vectors import cosine, softmax


def columns(student: np.ndarray, teacher: np.ndarray, temperatures: list[float]) -> float:
    """One minus the mean over classes of the cosine between the two columns of probabilities."""
    ps, pt = (
        np.array([softmax(z, t) for z, t in zip(network, temperatures, strict=True)]) for network in (student, teacher)
    )
    classes = student.shape[1]
    return 1 - sum(cosine(ps[:, k], pt[:, k]) for k in range(classes)) / classes


def class_similarity(student: np.ndarray, teacher: np.ndarray, temperature: float = 4.0, scale: float = 2.0) -> float:
    return scale * temperature**2 * columns(student, teacher, [temperature] * len(student))


def temperatures(student: np.ndarray, teacher: np.ndarray, low: float = 2.0, high: float = 6.0) -> list[float]:
    c = [cosine(softmax(a), softmax(b)) for a, b in zip(student, teacher, strict=True)]
    if max(c) == min(c):
        return [low] * len(c)
    return [(high - low) / (min(c) - max(c)) * (v - max(c)) + low for v in c]


def cosine_temperature(
    student: np.ndarray,
    teacher: np.ndarray,
    low: float = 2.0,
    high: float = 6.0,
    scale: float = 2.0,
    fixed: list[float] | None = None,
) -> float:
    """With the temperatures of these logits, or with those given."""
    each = temperatures(student, teacher, low, high) if fixed is None else fixed
    return scale * (sum(each) / len(each)) ** 2 * columns(student, teacher, each)
