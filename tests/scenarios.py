"""Writes ``docs/tested.md`` from the tests marked ``scenario``: ``python -m tests.scenarios``.

A marked test is a row: its title is the marker's with the names of its parameters. Its figure is the largest difference
to the loop written by hand: what the fixture ``difference`` records, or what the test's comparisons find, those apart
that show that the loss changes the training.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

assert_close, equal = torch.testing.assert_close, torch.equal

PAGE = Path(__file__).parents[1] / "docs" / "tested.md"
KINDS = {"networks": "Networks", "teachers": "Teachers", "batches": "Batches", "loops": "Loops and trainers"}
HEAD = """# Networks, batches and loops that are tested

Each row is a test of this repository. The figure is the largest difference that the test finds between the library
and the loss written by hand, or another reference: of weights, gradients or outputs; 0 is bit for bit. Rows without a
figure record none: something is refused, said, or held to the tolerance in the test. [The same computation](parity.md)
has the many ways to train one network.

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
    return kind, ", ".join(part for part in (*title, params.id if params is not None else "") if part)


_found: list[float] = []
CHANGED = 1e-4
"""Larger differences are those of a training without the loss."""


def record_result(compare: Callable[..., float]) -> Callable[..., float]:
    """A comparison that keeps what it finds."""

    def recorded(*args: Any) -> float:
        value = compare(*args)
        _found.append(float(value))
        return value

    return recorded


def record_close(actual: Any, expected: Any, **options: Any) -> None:
    """``torch.testing.assert_close`` that keeps the largest difference."""
    assert_close(actual, expected, **options)
    for x, y in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.numel():
            _found.append(float((x.detach().double() - y.detach().double()).abs().max()))


def record_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """``torch.equal`` that keeps a 0."""
    same = equal(x, y)
    _found.extend([0.0] * same)
    return same


class Rows:
    """Plugin of pytest that collects the rows of the tests that passed."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in KINDS}
        self.titles: dict[str, tuple[str, str]] = {}

    def pytest_configure(self) -> None:
        """Replace the comparisons before tests import them."""
        from tests import parity
        from tests.harness import faces, nets, toys

        nets.gap = toys.gap = record_result(nets.gap)
        faces.largest, parity.apart = map(record_result, (faces.largest, parity.apart))
        torch.testing.assert_close, torch.equal = record_close, record_equal

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.titles = {item.nodeid: found for item in items if (found := title_of(item)) is not None}

    def pytest_runtest_setup(self) -> None:
        _found.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and report.nodeid in self.titles:
            kind, title = self.titles[report.nodeid]
            figure: Any = dict(report.user_properties).get("difference", max(filter(_same, _found), default=None))
            written = "" if figure is None else f"{float(figure):.1e}" if figure else "0"
            self.rows[kind].append((title, written, report.nodeid.partition("[")[0].removeprefix("tests/")))


def _same(value: float) -> bool:
    return value <= CHANGED


def main() -> int:
    """Run the marked tests and write the page; pytest's exit code if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    out: Path = parser.parse_args().out
    plugin = Rows()
    if code := pytest.main(["-q", "-m", "scenario", "tests"], [plugin]):
        return int(code)
    from tests.parity.__main__ import hardware

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
