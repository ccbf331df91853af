"""Few-shot accuracy by plain loops."""

import math
from collections.abc import Sequence


def few_shot(
    rows: Sequence[Sequence[float]], episodes: Sequence[Sequence[Sequence[int]]], shots: int, cosine: bool = False
) -> tuple[float, float]:
    """Mean accuracy over episodes, each a list of row numbers per class, and half the width of its interval."""
    accuracies = []
    for episode in episodes:
        prototypes = [_mean([_used(rows[n], cosine) for n in members[:shots]]) for members in episode]
        right = total = 0
        for way, members in enumerate(episode):
            for n in members[shots:]:
                query = _used(rows[n], cosine)
                far = [sum((a - b) ** 2 for a, b in zip(query, _used(c, cosine), strict=True)) for c in prototypes]
                right += far.index(min(far)) == way
                total += 1
        accuracies.append(right / total)
    mean = sum(accuracies) / len(accuracies)
    variance = sum((a - mean) ** 2 for a in accuracies) / (len(accuracies) - 1)
    return mean, 1.96 * math.sqrt(variance / len(accuracies))


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _used(row: Sequence[float], cosine: bool) -> Sequence[float]:
    length = math.sqrt(sum(x * x for x in row)) if cosine else 1.0
    return [x / length for x in row] if length else row
