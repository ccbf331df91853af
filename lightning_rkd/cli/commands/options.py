"""What the commands take: kinds of values, and folders to write into."""

from __future__ import annotations

import argparse
from pathlib import Path


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


def check_folder(out: Path, made_by: str, what: str) -> None:
    """Refuse an output folder that holds other things.

    Args:
        out: The folder, which may be absent or empty.
        made_by: The file that every folder of this command holds.
        what: The command.

    Raises:
        FileExistsError: It is a file, or holds something else.

    Example:
        >>> check_folder(Path("no such folder"), "demo.yaml", "demo")
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"the output folder {str(out)!r} is a file; choose another one with --out")
    begun = {made_by, f".{made_by}.part"}  # the latter alone, should the first write have been killed
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in begun):
        raise FileExistsError(f"{str(out)!r} holds something that no {what} made; choose another folder with --out")
