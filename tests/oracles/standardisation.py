"""Z-scores of rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def z_scores(row: np.ndarray) -> list[float]:
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / max(1, len(row) - 1))
    return [(x - mean) / (deviation + 1e-7) for x in row]


def standardised(loops: Callable[..., float], *logits: np.ndarray, standardise: bool, **settings: Any) -> float:
    """The loops of logits whose rows have been standardised."""
    rows = (np.array([z_scores(row) for row in z]) if standardise else z for z in logits)
    return loops(*rows, **settings)
