"""Shared fixtures: seeded tests, and two processes on demand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two gloo processes that stay up for the whole session."""
    pool = Ranks(2)
    yield pool
    pool.close()
