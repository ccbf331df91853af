"""Shared fixtures: seeded tests, and two processes on demand."""

import os

# Before PyTorch is imported, and for processes: a test worker runs on every core
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import gc
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from lightning_rkd.export import card
from tests.harness.ranks import Ranks


def pytest_collection_finish() -> None:
    """Freeze the objects of collection, which stay to the end, so that garbage collection skips them in every test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries report what is never collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Leaves the next test the number of threads and the environment that this one found: both change results."""
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies, for the card of each export, would take seconds to measure well."""
    monkeypatch.setattr(card, "SECONDS", 0.0)


@pytest.fixture
def difference(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Check a difference to the loss written by hand, and record it for ``docs/tested.md``."""

    def check(found: float, limit: float) -> None:
        assert found <= limit
        record_property("difference", found)

    return check


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two gloo processes that stay up for the whole session."""
    pool = Ranks(2)
    yield pool
    pool.close()
