"""Plain loops in float64 that contrastive losses with memories share."""

import math
from collections.abc import Sequence

from tests.oracles.vectors import Rows, unit


def renewed(memory: Rows, indices: Sequence[int], rows: Rows, momentum: float) -> list[list[float]]:
    """The memory after a batch; an index that comes several times counts once, with the mean of its rows."""
    new = [list(m) for m in memory]
    for i in set(indices):
        mine = [row for j, row in zip(indices, rows, strict=True) if j == i]
        mean = [math.fsum(column) / len(mine) for column in zip(*mine, strict=True)]
        new[i] = unit([momentum * m + (1 - momentum) * x for m, x in zip(memory[i], mean, strict=True)])
    return new


def nce(exponentials: Rows, z: float, num_samples: int) -> float:
    """The exponentials of each row's similarities, its partner's first; as crd/criterion.py of RepDistiller does it."""
    eps, total = 1e-7, 0.0
    for row in exponentials:
        partner, *others = [e / z for e in row]
        noise = len(others) / num_samples
        total += math.log(partner / (partner + noise + eps))
        total += math.fsum(math.log(noise / (p + noise + eps)) for p in others)
    return -total / len(exponentials)
