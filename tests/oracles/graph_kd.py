"""Graph knowledge distillation, edge by edge, in the order of the authors' code: normalise, mask, thin out, power."""

import numpy as np

from tests.oracles.vectors import cosine, squares

Graph = list[list[float]]


def graph_kd(
    students: list[np.ndarray],
    teachers: list[np.ndarray],
    mask: np.ndarray | None = None,
    neighbours: int | None = None,
    power: int = 1,
) -> float:
    """Mean over pairs of layers, each (N, ...), of the sum of squared differences of all edges."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        n = len(student)
        graphs = [_adjacency(x.reshape(n, -1), mask) for x in (student, teacher)]
        if neighbours is not None:
            keep = _neighbours(graphs[1], neighbours)
            graphs = [[[g[i][j] if keep[i][j] else 0.0 for j in range(n)] for i in range(n)] for g in graphs]
        s, t = (_power(g, power) for g in graphs)
        total += sum(squares(a, b) for a, b in zip(s, t, strict=True))
    return total / len(students)


def _adjacency(x: np.ndarray, mask: np.ndarray | None) -> Graph:
    n = len(x)
    edges = [[max(0.0, cosine(x[i], x[j])) if i != j else 0.0 for j in range(n)] for i in range(n)]
    degree = [sum(row) for row in edges]
    for i in range(n):
        for j in range(n):
            edges[i][j] *= (degree[i] * degree[j]) ** -0.5 if degree[i] * degree[j] > 0 else 0.0
            edges[i][j] *= 1.0 if mask is None else float(mask[i, j])
    return edges


def _neighbours(graph: Graph, k: int) -> list[list[bool]]:
    n = len(graph)
    strongest = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: -graph[i][j])[:k] for i in range(n)]
    return [[j in strongest[i] or i in strongest[j] for j in range(n)] for i in range(n)]


def _power(graph: Graph, power: int) -> Graph:
    n, result = len(graph), graph
    for _ in range(power - 1):
        result = [[sum(result[i][m] * graph[m][j] for m in range(n)) for j in range(n)] for i in range(n)]
    return result
