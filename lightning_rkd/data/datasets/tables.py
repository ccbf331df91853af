"""The small text files in which archives list their images."""

from __future__ import annotations

from pathlib import Path


def rows_of(path: Path, columns: int, skip: int = 0, separator: str | None = None) -> list[list[str]]:
    """The fields of every line that is not empty.

    Args:
        path: The file.
        columns: Fields per line; the last one takes the rest of the line.
        skip: Lines of heading.
        separator: Between fields; white space by default.

    Raises:
        ValueError: A line with fewer fields, by its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if number <= skip or not line.strip():
            continue
        fields = line.strip().split(separator, columns - 1)
        if len(fields) < columns:
            raise ValueError(
                f"line {number} of {path} has {len(fields)} fields instead of {columns} ({line!r}), so the file is "
                "damaged: extract the archive again"
            )
        rows.append(fields)
    return rows
