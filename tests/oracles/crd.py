"""CRD by plain loops, from crd/criterion.py and crd/memory.py of HobbitLong/RepDistiller."""

import math
from collections.abc import Sequence

from tests.oracles.memory import nce
from tests.oracles.vectors import Rows, dot


def crd(features: Rows, memory: Rows, which: Sequence[Sequence[int]], temperature: float, z: float) -> float:
    """One of the two terms: features of one network against the memory of the other."""
    exponentials = [
        [math.exp(dot(v, memory[j]) / temperature) for j in chosen] for v, chosen in zip(features, which, strict=True)
    ]
    return nce(exponentials, z, len(memory))


def first_z(features: Rows, memory: Rows, which: Sequence[Sequence[int]], temperature: float) -> float:
    """The normalising constant as RepDistiller sets it from its first batch."""
    every = [
        math.exp(dot(v, memory[j]) / temperature) for v, chosen in zip(features, which, strict=True) for j in chosen
    ]
    return math.fsum(every) / len(every) * len(memory)
