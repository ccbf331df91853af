"""Holistic distillation by plain loops, from distiller_zoo/GNN.py of wyc-ruiker/HKD and DGL's TAGConv."""

import math
from collections.abc import Sequence

from tests.oracles.vectors import Row, Rows, cosine, dot, linear, softmax, unit


def info_nce(features: Rows, partners: Rows, memory: Rows, which: Sequence[Sequence[int]], temperature: float) -> float:
    total = 0.0
    for v, partner, chosen in zip(features, partners, which, strict=True):
        total -= math.log(softmax([dot(v, partner), *(dot(v, memory[j]) for j in chosen)], temperature)[0])
    return total / len(features)


def neighbours(logits: Rows, k: int) -> list[list[int]]:
    """Of each sample the k with the nearest predictions, itself first."""
    predictions, rows = [softmax(z) for z in logits], range(len(logits))
    nearness = [[2.0 if i == j else cosine(predictions[i], predictions[j]) for j in rows] for i in rows]
    return [sorted(rows, key=lambda j, i=i: -nearness[i][j])[:k] for i in rows]


def tag_conv(x: Rows, into: Sequence[Sequence[int]], weight: Rows, bias: Row) -> list[list[float]]:
    """One hop of DGL's TAGConv on the graph with an edge from each of ``into[i]`` to i, then l2 normalisation."""
    n = len(x)
    norm = [max(len(into[i]), 1) ** -0.5 for i in range(n)]  # of the in-degree
    smoothed = []
    for i in range(n):
        received = [math.fsum(norm[j] * x[j][d] for j in into[i]) for d in range(len(x[0]))]
        smoothed.append([norm[i] * r for r in received])
    return [unit(linear(weight, bias, [*a, *b])) for a, b in zip(x, smoothed, strict=True)]
