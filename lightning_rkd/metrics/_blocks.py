"""Block sizes of a search that keep its work within a number of bytes."""

from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of blocks for rows of a width and a budget in bytes; at least one row, whatever the budget.

    Sizes count the most bytes that any operation of the search holds at the same time, in float64.
    """

    memory: int
    dim: int

    @property
    def entries(self) -> int:
        """Entries of a block of scores: a sixteenth of the memory, or a thirty-second in float32."""
        return max(1, self.memory // 128)

    @property
    def longest(self) -> int:
        """Rows that can be converted for comparison at once: a quarter of the memory."""
        return max(1, self.memory // (128 * self.dim))

    @property
    def rows(self) -> int:
        """Rows of a block without further constraints."""
        return min(isqrt(self.entries), self.longest)

    def scores(self, width: int) -> tuple[int, int]:
        """Queries and gallery rows of a block of scores from which each query keeps ``width``."""
        columns = max(isqrt(self.entries), 4 * width)  # longer blocks for wide neighbourhoods, so that fewer merges
        return min(max(1, self.entries // columns), self.longest), min(columns, self.longest)

    def queries(self, width: int) -> int:
        """Queries of one pass over the gallery, at 80 bytes per neighbour if ties leave every order unresolved."""
        return max(1, self.memory // (16 * self.dim + 80 * width))
