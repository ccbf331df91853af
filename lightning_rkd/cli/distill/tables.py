"""Tables of texts and their labels."""

import csv
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_rkd.utils.imports import MissingExtraError

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(path: Path, text_column: str, label_column: str | None) -> tuple[list[str], list[Any] | None]:
    """Texts of a table, and their labels if a column is named.

    Raises:
        ValueError: The table cannot be read or has no rows, a column is missing, or a row has no text or no label.
    """
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"the table {str(path)!r} has no rows")
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column is not None and column not in rows[0]:
            raise ValueError(f"{str(path)!r} has no column {column!r}: name one of {', '.join(rows[0])} with {option}")
    for number, row in enumerate(rows):
        if not isinstance(row.get(text_column), str) or not row[text_column].strip():
            raise ValueError(f"{str(path)!r}: row {number} has no text in the column {text_column!r}; take it out")
        if label_column is not None and row.get(label_column) in (None, ""):
            raise ValueError(
                f"{str(path)!r}: row {number} has no label in the column {label_column!r}; label it, or take it out"
            )
    labels = None if label_column is None else [row[label_column] for row in rows]
    return [row[text_column] for row in rows], labels


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        if find_spec("pyarrow") is None:
            raise MissingExtraError(f"{str(path)!r} is read with pyarrow, which is not installed: pip install pyarrow")
        columns = import_module("pyarrow.parquet").read_table(path).to_pydict()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            if path.suffix == ".jsonl":
                return [_read_line(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except UnicodeDecodeError as error:
        raise ValueError(f"the table {str(path)!r} is not in UTF-8 ({error}): save it in that encoding") from error


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of {str(path)!r} is no JSON ({error.msg}): mend it") from error
    if not isinstance(found, dict):
        raise ValueError(f'line {number} of {str(path)!r}: expected an object, such as {{"text": ...}}, got {line:.40}')
    return found
