"""Instance relationship graphs as the authors' Caffe layers compute them, loop by loop."""

import numpy as np

from tests.oracles.vectors import squares


def pooled(maps: np.ndarray) -> np.ndarray:
    n, c = maps.shape[:2]
    return np.array([[sum(maps[i, k].reshape(-1)) / maps[i, k].size for k in range(c)] for i in range(n)])


def edge_map(x: np.ndarray) -> list[list[float]]:
    """Squared distances between the samples over the largest of them."""
    d = [[squares(a, b) for b in x] for a in x]
    largest = max(v for row in d for v in row) or 1.0
    return [[v / largest for v in row] for row in d]


def moved(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Squared distance between a sample's two features over the largest in the batch."""
    d = [squares(a, b) for a, b in zip(before, after, strict=True)]
    largest = max(d) or 1.0
    return [v / largest for v in d]


def vertices(s: np.ndarray, t: np.ndarray) -> float:
    return sum(squares(a, b) for a, b in zip(s, t, strict=True)) / (2 * len(s))


def edges(s: np.ndarray, t: np.ndarray) -> float:
    """Caffe's Euclidean loss of two blobs of N rows."""
    pairs = zip(edge_map(s), edge_map(t), strict=True)
    return sum((x - y) ** 2 for a, b in pairs for x, y in zip(a, b, strict=True)) / (2 * len(s))


def transformation(s: tuple[np.ndarray, np.ndarray], t: tuple[np.ndarray, np.ndarray]) -> float:
    """Caffe's Euclidean loss of two blobs of one row."""
    return sum((x - y) ** 2 for x, y in zip(moved(*s), moved(*t), strict=True)) / 2


def edges_backward(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Of :func:`edges`, as the Caffe layer computes it: the largest is a constant, an edge pulls its first sample."""
    n = len(s)
    largest = max(squares(a, b) for a in s for b in s) or 1.0
    of_student, of_teacher = edge_map(s), edge_map(t)
    pulls = np.zeros_like(s)
    for i in range(n):
        for j in range(n):
            pulls[i] += (of_student[i][j] - of_teacher[i][j]) / n * 2 / largest * (s[i] - s[j])
    return pulls


def transformation_backward(
    s: tuple[np.ndarray, np.ndarray], t: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of :func:`transformation`, to both ends of the student's, with the largest as a constant."""
    largest = max(squares(a, b) for a, b in zip(*s, strict=True)) or 1.0
    before = np.zeros_like(s[0])
    for i, (own, target) in enumerate(zip(moved(*s), moved(*t), strict=True)):
        before[i] = (own - target) * 2 / largest * (s[0][i] - s[1][i])
    return before, -before
