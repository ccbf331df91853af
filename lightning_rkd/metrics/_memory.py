"""How much of a search is done at a time, so that the work fits into a number of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class Room:
    """Sizes of blocks for rows of a width and a budget; each is at least one row, whatever the budget.

    The bytes counted are the most that any operation of the search holds at the same time, in float64.

    Args:
        memory: Bytes.
        dim: Numbers in a row.

    Example:
        >>> room = Room(128 * 2**20, dim=128)
        >>> room.block, room.shape(width=9), room.queries(width=9)
        (1024, (1024, 1024), 48489)
        >>> Room(1, dim=128).shape(width=9)
        (1, 1)
    """

    memory: int
    dim: int

    @property
    def entries(self) -> int:
        """Of a block of scores: a sixteenth of the memory, or a thirty-second in float32."""
        return max(1, self.memory // 128)

    @property
    def longest(self) -> int:
        """As many rows as can be brought into the form in which they are compared: a quarter of the memory."""
        return max(1, self.memory // (128 * self.dim))

    @property
    def block(self) -> int:
        """Rows, where nothing else matters."""
        return min(isqrt(self.entries), self.longest)

    def shape(self, width: int) -> tuple[int, int]:
        """Queries and gallery rows of a block of scores from which each query keeps ``width``."""
        wide = max(isqrt(self.entries), 4 * width)  # wide neighbourhoods: fewer, longer blocks, so that fewer merges
        return min(max(1, self.entries // wide), self.longest), min(wide, self.longest)

    def queries(self, width: int) -> int:
        """Queries of one tour of the gallery: 80 bytes for each neighbour where ties leave every order open."""
        return max(1, self.memory // (16 * self.dim + 80 * width))
