"""Running selection of the smallest entries of each row over blocks of columns, sixteen comparisons at a time."""

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels.jit import compiled
from lightning_rkd.functional._kernels.threads import in_ranges, shares

LAST = torch.iinfo(torch.int64).max
_TOGETHER = 16
_ROWS = 64  # per thread at least


class Kept:
    """The ``width`` smallest pairs (score, place) of each row among all that were offered, in CPU memory.

    Each row has a buffer of one and a half times the width. A candidate before the row's bound, the last pair that can
    stay, is appended; when the buffer is full, a selection in linear time drops the others and tightens the bound. So
    an entry costs one comparison, and a candidate constant time, whatever the width and the number of ties.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.width = width
        capacity = width + max(_TOGETHER, width // 2)
        self.scores, self.places = (torch.empty(rows, capacity, dtype=d) for d in (dtype, torch.int64))
        self.counts = torch.zeros(rows, dtype=torch.int64)
        self.bounds, self.bound_places = torch.full((rows,), torch.inf, dtype=dtype), torch.full((rows,), LAST)

    def offer(self, scores: Tensor, places: Tensor) -> None:
        """Add the scores (rows, n), without NaN, of n columns and their places (n,); each column is offered once."""
        block, columns = scores.contiguous().numpy(), places.contiguous().numpy()
        state = [x.numpy() for x in (self.scores, self.places, self.counts, self.bounds, self.bound_places)]
        in_ranges(
            lambda _, start, stop: _scan(self.width, start, stop, block, columns, *state),
            len(block),
            shares(len(block), _ROWS),
        )

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Scores and places, (rows, width) each, smallest first, ties by place; infinity where there were too few."""
        scores = self.scores.new_full((len(self.scores), self.width), torch.inf)
        places = self.places.new_full((len(self.places), self.width), LAST)
        arrays = [x.numpy() for x in (self.scores, self.places, self.counts, scores, places)]
        in_ranges(
            lambda _, start, stop: _sort(self.width, start, stop, *arrays), len(scores), shares(len(scores), _ROWS)
        )
        return scores, places


@compiled("f1 i1 i0 i0 i0")
def _select(scores: Any, places: Any, low: int, high: int, width: int) -> None:
    """Move the ``width`` smallest pairs to the front, among positions ``low`` to ``high`` inclusive (quickselect)."""
    while low < high:
        middle = (low + high) // 2
        pivot, pivot_place = scores[middle], places[middle]
        left, right = low, high
        while left <= right:
            while scores[left] < pivot or (scores[left] == pivot and places[left] < pivot_place):
                left += 1
            while scores[right] > pivot or (scores[right] == pivot and places[right] > pivot_place):
                right -= 1
            if left <= right:
                scores[left], scores[right] = scores[right], scores[left]
                places[left], places[right] = places[right], places[left]
                left += 1
                right -= 1
        if width - 1 <= right:
            high = right
        elif width - 1 >= left:
            low = left
        else:
            return


@compiled("i0 i0 i0 f2 i1 f2 i2 i1 f1 i1")
def _scan(
    width: int,
    start: int,
    stop: int,
    block: Any,
    columns: Any,
    scores: Any,
    places: Any,
    counts: Any,
    bounds: Any,
    bound_places: Any,
) -> None:
    for row in range(start, stop):
        values, kept, kept_places = block[row], scores[row], places[row]
        bound, bound_place, count = bounds[row], bound_places[row], counts[row]
        for first in range(0, len(values), _TOGETHER):
            last = min(first + _TOGETHER, len(values))
            if last - first == _TOGETHER:
                hits = 0
                for column in range(_TOGETHER):
                    hits |= values[first + column] <= bound
                if not hits:
                    continue
            for column in range(first, last):
                value, place = values[column], columns[column]
                if value < bound or (value == bound and place < bound_place):
                    kept[count], kept_places[count] = value, place
                    count += 1
                    if count == len(kept):
                        _select(kept, kept_places, 0, count - 1, width)
                        count = width
                        # the selection leaves the last of those that stay at its place
                        bound, bound_place = kept[width - 1], kept_places[width - 1]
        bounds[row], bound_places[row], counts[row] = bound, bound_place, count


@compiled("i0 i0 i0 f2 i2 i1 f2 i2")
def _sort(
    width: int, start: int, stop: int, scores: Any, places: Any, counts: Any, sorted_scores: Any, sorted_places: Any
) -> None:
    for row in range(start, stop):
        count = min(counts[row], width)
        if counts[row] > width:
            _select(scores[row], places[row], 0, counts[row] - 1, width)
        ordered, ordered_places = sorted_scores[row], sorted_places[row]
        ordered[:count], ordered_places[:count] = scores[row, :count], places[row, :count]
        gap = count
        while gap > 1:  # Shellsort: in place, and no slower where all scores are equal
            gap = max(1, gap * 4 // 9)
            for at in range(gap, count):
                score, place, hole = ordered[at], ordered_places[at], at
                while hole >= gap and (
                    ordered[hole - gap] > score or (ordered[hole - gap] == score and ordered_places[hole - gap] > place)
                ):
                    ordered[hole], ordered_places[hole] = ordered[hole - gap], ordered_places[hole - gap]
                    hole -= gap
                ordered[hole], ordered_places[hole] = score, place
