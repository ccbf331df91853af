"""Retrieval by plain loops over float64 distances: slow, and obviously right."""

import math
from collections.abc import Sequence


def retrieval(
    rows: Sequence[Sequence[float]],
    labels: Sequence[int],
    indices: Sequence[int] | None = None,
    is_query: Sequence[bool] | None = None,
    k: Sequence[int] = (1,),
    cosine: bool = False,
    gallery_rows: Sequence[Sequence[float]] | None = None,
    self_match: bool = False,
) -> dict[str, float]:
    """Rows are queries, and gallery rows too where there are no others; a query does not find its own index."""
    samples, seen = [], set()
    for n, (row, label) in enumerate(zip(rows, labels, strict=True)):
        role = bool(is_query[n]) if is_query is not None else None
        key = (indices[n] if indices is not None else n, role)
        if key not in seen:
            seen.add(key)
            samples.append((key[0], label, row, role, row if gallery_rows is None else gallery_rows[n]))
    sums = {**{f"recall_at_{n}": 0.0 for n in k}, "map_at_r": 0.0, "r_precision": 0.0}
    counted = 0
    for query in samples:
        if query[3] is False:
            continue
        gallery = [g for g in samples if g[3] is not True and (self_match or g[0] != query[0])]
        far = _one_minus_cosine if cosine else _squared
        ordered = sorted(gallery, key=lambda g: (far(query[2], g[4]), g[0]))
        relevant = [g[1] == query[1] for g in ordered]
        r = sum(relevant)
        if r == 0:
            continue
        counted += 1
        for n in k:
            sums[f"recall_at_{n}"] += any(relevant[:n])
        sums["r_precision"] += sum(relevant[:r]) / r
        sums["map_at_r"] += sum(sum(relevant[: j + 1]) / (j + 1) for j in range(r) if relevant[j]) / r
    return {name: value / counted for name, value in sums.items()}


def _squared(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def _one_minus_cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 1.0
