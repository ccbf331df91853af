"""What pairs of runs with the same seeds say about a difference: its mean, and Student's interval around it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Mean of the differences of pairs, and half the width of its interval (``nan`` for a single pair)."""

    mean: float
    half_width: float
    pairs: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    r"""The difference of two networks over the seeds that both have, :math:`\bar d \pm t_{n-1} s_d / \sqrt n`.

    Runs of one seed see the same batches and begin with the same weights, so their difference varies less than either.
    The interval holds where differences are normally distributed, and says nothing about other data.

    Args:
        values: By seed.
        baseline: By seed.
        confidence: How often such intervals hold the expected difference.

    Returns:
        ``None`` if there is no seed that both have.

    Example:
        >>> found = paired_difference({0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: 0.0})
        >>> found.mean, round(found.half_width, 3), found.pairs
        (2.0, 2.484, 3)
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    n = len(differences)
    half = math.nan
    if n > 1:
        half = t_quantile(0.5 + confidence / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(statistics.fmean(differences), half, n)


def t_quantile(p: float, degrees: int) -> float:
    """The value that Student's t stays below with probability ``p``, to about 12 digits.

    Args:
        p: Above 0 and below 1.
        degrees: Degrees of freedom, at least 1.

    Example:
        >>> round(t_quantile(0.975, 2), 3), round(t_quantile(0.975, 9), 3)
        (4.303, 2.262)
    """
    if not 0 < p < 1 or degrees < 1:
        raise ValueError(f"t_quantile needs 0 < p < 1 and degrees >= 1, got {p} and {degrees}")
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # more than the digits of a float
        angle = (low + high) / 2
        low, high = (angle, high) if 0.5 + _within(angle, degrees) / 2 < p else (low, angle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|t| < tan(angle) sqrt(degrees)): the finite series for whole degrees (Abramowitz and Stegun, 26.7.3-4)."""
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
