"""A pytest plugin for an installation without extras, which skips what needs one: ``.ci/core`` loads it.

A package of an extra that the library imports without naming the extra is an error, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rkd.utils.imports import MissingExtraError

FOLDERS = {"_kernels", "campaigns", "cli", "kernels"}
"""Folders of the tests and of the package that need an extra as a whole."""
FILES = {"test_docs.py", "test_gallery.py", "test_install.py", "test_notebooks.py", "test_package.py"}
"""Tests of a checkout."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what needs an extra or a checkout as a whole."""
    return True if collection_path.name in FOLDERS | FILES else None


def _is_other(module: str) -> bool:
    return module.partition(".")[0] not in ("lightning_rkd", "tests")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skip a file whose imports need an extra."""
    report = yield
    text = str(report.longrepr)
    missing = re.findall(r"^E +(?:\S*MissingExtraError: (.*)|ModuleNotFoundError: No module named '(.*)')$", text, re.M)
    places = re.findall(r"^(\S+):\d+: in ", text, re.M)
    if (
        report.failed
        and missing
        and (missing[-1][0] or ("lightning_rkd/" not in places[-1] and _is_other(missing[-1][1])))
    ):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "".join(missing[-1]))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Skip a test that needs an extra."""
    report = yield
    if report.failed and call.excinfo is not None:
        error, place = call.excinfo.value, str(call.excinfo.traceback[-1].path)
        absent = isinstance(error, ModuleNotFoundError) and "lightning_rkd/" not in place and _is_other(str(error.name))
        if absent or isinstance(error, MissingExtraError):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, str(error))
    return report
