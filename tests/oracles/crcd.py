"""CRCD's feature relation by plain loops, from crcd/criterion.py and crcd/memory.py of Lechatelia/CRCD."""

import math
from collections.abc import Sequence

from tests.oracles.memory import nce
from tests.oracles.vectors import Row, Rows, dot, unit


def relation(x: Row, anchor: Row) -> list[float]:
    return unit([a - b + 1e-6 for a, b in zip(x, anchor, strict=True)])


def crcd(
    features: Rows, memory: Rows, indices: Sequence[int], which: Sequence[Sequence[int]], temperature: float, z: float
) -> float:
    """One of the two terms."""
    exponentials = []
    for v, chosen in zip(features, which, strict=True):
        for a in indices:
            mine = relation(v, memory[a])
            exponentials.append([math.exp(dot(mine, relation(memory[j], memory[a])) / temperature) for j in chosen])
    return nce(exponentials, z, len(memory))
