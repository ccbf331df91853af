"""Student's interval around the mean of paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_rkd.utils.imports import require


class Difference(NamedTuple):
    """Mean of paired differences, and the ends of its interval (``nan`` for a single pair)."""

    mean: float
    low: float
    high: float


def confidence_half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    r"""Half the width of Student's interval around a mean, :math:`t_{n-1} s / \sqrt n`; ``nan`` for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = float(require("scipy.special", extra="plots").stdtrit(len(values) - 1, 0.5 + confidence / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """Difference of values by seed over the seeds that both have, if any, with Student's interval.

    Runs of one seed see the same batches and start from the same weights, so their difference varies less than either.
    The interval assumes normally distributed differences; it covers other seeds, not other data.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    mean, half_width = statistics.fmean(differences), confidence_half_width(differences, confidence)
    return Difference(mean, mean - half_width, mean + half_width)
