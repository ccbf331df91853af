"""A pytest plugin for an installation without extras, which skips what needs one: ``.ci/core`` loads it.

A package of an extra that the library imports without naming the extra is an error, as everywhere.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.doctest import MultipleDoctestFailures

from lightning_rkd.utils.imports import MissingExtraError

FOLDERS = {"_kernels", "campaigns", "cli", "kernels"}
"""Folders of the tests and of the package that need an extra as a whole."""
FILES = {"test_docs.py", "test_install.py", "test_notebooks.py", "test_package.py"}
"""Tests of a checkout."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what needs an extra or a checkout as a whole."""
    return True if collection_path.name in FOLDERS | FILES else None


def _may_need_an_extra(place: str) -> bool:
    """True for files of the tests and of the program, which import packages of extras without naming the extra."""
    return "lightning_rkd/" not in place or "lightning_rkd/cli/" in place


def _needs_an_extra(error: BaseException, place: str) -> bool:
    """True for a package that is missing in a test or in the program, and for an error that names the extra."""
    if isinstance(error, doctest.UnexpectedException):
        _, cause, traceback = error.exc_info
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        return _needs_an_extra(cause, traceback.tb_frame.f_code.co_filename)
    absent = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] != "lightning_rkd"
    return isinstance(error, MissingExtraError) or (absent and _may_need_an_extra(place))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skip a file whose imports need an extra."""
    report = yield
    text = str(report.longrepr)
    named = re.search(r"MissingExtraError: (.*)", text)
    missing = re.search(r"ModuleNotFoundError: (No module named '(?!lightning_rkd|tests).*')", text)
    places = re.findall(r"^(\S+):\d+: in ", text, re.M)
    if report.failed and (found := named or (missing if _may_need_an_extra(places[-1]) else None)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, found[1])
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Skip a test that needs an extra."""
    report = yield
    if report.failed and call.excinfo is not None:
        error = call.excinfo.value
        errors = error.failures if isinstance(error, MultipleDoctestFailures) else [error]
        if any(_needs_an_extra(one, str(call.excinfo.traceback[-1].path)) for one in errors):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, str(error))
    return report
