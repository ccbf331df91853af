"""Holistic distillation by plain loops, from distiller_zoo/GNN.py of wyc-ruiker/HKD and DGL's TAGConv."""

import math
from collections.abc import Sequence

from tests.oracles.memory import Row, Rows, dot, linear, unit


def info_nce(features: Rows, partners: Rows, memory: Rows, which: Sequence[Sequence[int]], temperature: float) -> float:
    total = 0.0
    for v, partner, chosen in zip(features, partners, which, strict=True):
        scores = [dot(v, partner) / temperature, *(dot(v, memory[j]) / temperature for j in chosen)]
        highest = max(scores)
        total += highest + math.log(math.fsum(math.exp(s - highest) for s in scores)) - scores[0]
    return total / len(features)


def neighbours(logits: Rows, k: int) -> list[list[int]]:
    """Of each sample the k with the nearest predictions, itself first."""
    predictions = []
    for z in logits:
        exponentials = [math.exp(x - max(z)) for x in z]
        predictions.append([e / math.fsum(exponentials) for e in exponentials])
    n = len(logits)
    distances = [[-1.0 if i == j else 1 - dot(unit(predictions[i]), unit(predictions[j])) for j in range(n)]
                 for i in range(n)]  # fmt: skip
    return [sorted(range(n), key=lambda j, i=i: distances[i][j])[:k] for i in range(n)]


def tag_conv(x: Rows, into: Sequence[Sequence[int]], weight: Rows, bias: Row) -> list[list[float]]:
    """One hop of DGL's TAGConv on the graph with an edge from each of ``into[i]`` to i, then l2 normalisation."""
    n = len(x)
    norm = [max(len(into[i]), 1) ** -0.5 for i in range(n)]  # of the in-degree
    smoothed = []
    for i in range(n):
        received = [math.fsum(norm[j] * x[j][d] for j in into[i]) for d in range(len(x[0]))]
        smoothed.append([norm[i] * r for r in received])
    return [unit(linear(weight, bias, [*a, *b])) for a, b in zip(x, smoothed, strict=True)]
