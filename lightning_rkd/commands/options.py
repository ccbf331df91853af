"""Kinds of values that the commands take."""

from __future__ import annotations

import argparse


def seeds(text: str) -> tuple[int, ...]:
    """``"3"`` is 0, 1, 2; ``"0,3"`` and ``"3,"`` are lists.

    Example:
        >>> seeds("3"), seeds("7,")
        ((0, 1, 2), (7,))
    """
    parts = [part for part in text.split(",") if part.strip()]
    numbers = tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()
    found = tuple(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected a number of seeds (3) or different seeds (0,1,2), got {text!r}")
    return found


def positive(text: str) -> int:
    """A number of at least 1.

    Example:
        >>> positive("12")
        12
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
