"""Inter-channel correlation by plain loops: convolution, batch normalisation, Gram matrix, unit rows."""

import numpy as np

from tests.oracles.vectors import dot, squares, standardised, unit


def embed(maps: np.ndarray, weight: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A 1 x 1 convolution with ``weight`` (C_t, C_s) on (N, C_s, P), then batch normalisation."""
    n, _, p = maps.shape
    out = np.zeros((n, len(weight), p))
    for c, row in enumerate(weight):
        values = [dot(row, maps[i, :, x]) for i in range(n) for x in range(p)]
        out[:, c] = scale[c] * np.reshape(standardised(values, 1e-5), (n, p)) + shift[c]
    return out


def correlation(channels: np.ndarray) -> list[list[float]]:
    """Rows of the Gram matrix of one sample's channels (C, P), each of unit norm (or 0)."""
    return [unit([dot(a, b) for b in channels]) for a in channels]


def ickd(student: np.ndarray, teacher: np.ndarray) -> float:
    """Of embedded (N, C, P_s) and (N, C, P_t)."""
    n, c = student.shape[:2]
    pairs = [pair for s, t in zip(student, teacher, strict=True)
             for pair in zip(correlation(s), correlation(t), strict=True)]  # fmt: skip
    return sum(squares(*pair) for pair in pairs) / (n * c)


def ickd_of_maps(students: list[np.ndarray], teachers: list[np.ndarray], parameters: dict[str, np.ndarray]) -> float:
    total = 0.0
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        weight, scale, shift = (parameters[f"embed.{i}.{name}"] for name in ("0.weight", "1.weight", "1.bias"))
        s = embed(s.reshape(*s.shape[:2], -1), weight[:, :, 0], scale, shift)
        total += ickd(s, t.reshape(*t.shape[:2], -1))
    return total
