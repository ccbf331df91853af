"""The page of guarantees names tests that exist, and pages that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25
    for row in rows:
        assert re.search(r"`tests/\S+::test_\w+`", row), row
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE):
        assert name in functions_in(ROOT / file), f"{file} has no {name}"


def test_every_link_leads_to_a_page() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
