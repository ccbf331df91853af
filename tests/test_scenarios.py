"""The page of scenarios lists every marked test."""

import re

import pytest

from tests.scenarios import PAGE, title_of


def test_the_page_in_the_docs_lists_the_marked_tests(request: pytest.FixtureRequest) -> None:
    """Of those that run together with this test: all in ``make test``."""
    rows = {line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines()}
    titles = {found[1] for item in request.session.items if (found := title_of(item)) is not None}
    assert titles <= rows, "run python -m tests.scenarios"


def test_the_page_names_at_least_sixty_tests_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"`(\S+\.py)::(\w+)` \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 60
    for file, test in set(rows):
        source = (PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"{file} has no {test}: run python -m tests.scenarios"
