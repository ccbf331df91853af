"""Shared fixtures: seeded tests, and two processes on demand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes take seconds to start, so whatever needs them is slow."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests on tiny tensors, on which threads wait for one another more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two gloo processes that stay up for the whole session."""
    pool = Ranks(2)
    yield pool
    pool.close()
