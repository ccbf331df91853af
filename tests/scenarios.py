"""Writes ``docs/tested.md`` from the tests marked ``scenario``: ``python -m tests.scenarios``.

A marked test is a row: its title is the marker's with the names of its parameters, its figure what the test records by
``record_property("difference", x)``, the largest difference to the loop written by hand.
"""

import argparse
import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.__main__ import hardware

PAGE = Path(__file__).parents[1] / "docs" / "tested.md"
KINDS = {"networks": "Networks", "teachers": "Teachers", "batches": "Batches", "loops": "Loops and trainers"}
HEAD = """# Networks, batches and loops that are tested

Each row is a test of this repository. The figure is the largest difference between gradients (or, where only values can
be compared, between outputs) of the loss written by hand and of the library; 0 is bit for bit. Rows without a figure
test that something is refused, said or read right. [The same computation](parity.md) has the many ways to train one
network.

`python -m tests.scenarios` writes this page. {date}, {hardware}, Python {python}, torch {torch}.
{rows} rows.
"""


def title_of(item: pytest.Item) -> tuple[str, str] | None:
    """Kind and title of a marked test."""
    marker = item.get_closest_marker("scenario")
    if marker is None:
        return None
    kind, *title = marker.args
    params = getattr(item, "callspec", None)
    return kind, ", ".join([*title, *([params.id] if params is not None else [])])


class Rows:
    """Plugin of pytest that collects the rows of the tests that passed."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in KINDS}
        self.titles: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.titles = {item.nodeid: found for item in items if (found := title_of(item)) is not None}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and report.nodeid in self.titles:
            kind, title = self.titles[report.nodeid]
            figure: Any = dict(report.user_properties).get("difference")
            written = "" if figure is None else f"{float(figure):.1e}" if figure else "0"
            self.rows[kind].append((title, written, report.nodeid.partition("[")[0].removeprefix("tests/")))


def main() -> int:
    """Run the marked tests and write the page; pytest's exit code if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    out: Path = parser.parse_args().out
    plugin = Rows()
    if code := pytest.main(["-q", "-m", "scenario", "tests"], [plugin]):
        return int(code)
    page = HEAD.format(
        date=datetime.date.today(),
        hardware=hardware(),
        python=platform.python_version(),
        torch=torch.__version__,
        rows=sum(map(len, plugin.rows.values())),
    )
    for kind, rows in plugin.rows.items():
        page += f"\n## {KINDS[kind]}\n\n| | largest difference | test |\n|---|---|---|\n"
        page += "".join(f"| {title} | {figure} | `{test}` |\n" for title, figure, test in rows)
    part = out.with_suffix(".part")
    part.write_text(page)
    part.replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
