"""Bytes that devices exchange in a step and in an evaluation, as the page on scaling states them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import scaling
from lightning_rkd import RKD, Batch, Distiller, RelationalDistillation
from lightning_rkd.metrics import EmbeddingRetrieval
from tests.callbacks.test_ddp import batches
from tests.harness import toys
from tests.harness.ranks import Ranks

D_S, D_T = 5, 7


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def pool(request: pytest.FixtureRequest, ranks: Ranks) -> Iterator[Ranks]:
    """Two ranks and, in the slow tests, four."""
    if request.param == 2:
        yield ranks
        return
    four = Ranks(request.param)
    yield four
    four.close()


@contextmanager
def counting() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Bytes that this rank ends up with, and calls, by collective; those of DDP itself are not seen."""
    sizes: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def size(x: Any) -> int:
        return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(size, x))

    def watched(name: str) -> Any:
        call = getattr(dist, name)

        def wrapped(x: Any, *args: Any, **kwargs: Any) -> Any:
            sizes[name] += size(x)
            calls[name] += 1
            return call(x, *args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce", "broadcast"):
            patch.setattr(dist, name, watched(name))
        yield sizes, calls


def train(rank: int, steps: int) -> dict[str, int]:
    with counting() as (sizes, _), toys.devices(rank) as where:
        callback = RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")
        toys.fit(toys.Student(), callback, batches=batches(rank), max_steps=steps, **where)
    return dict(sizes)


def test_bytes_of_a_training_are_those_of_the_cost_model(ranks: Ranks) -> None:
    with torch.no_grad():
        assert toys.Backbone()(torch.randn(1, toys.WIDTH)).shape[1] == D_S
        assert toys.teacher()(torch.randn(1, toys.WIDTH)).shape[1] == D_T
    expected = scaling.step_traffic(2, 16, D_S, D_T)
    for few, many in zip(ranks.run(train, 2), ranks.run(train, 5), strict=True):
        assert {name: (many[name] - few[name]) / 3 for name in expected} == expected


def step(rank: int, rows: int) -> tuple[dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, D_S), nn.Linear(4, D_T)
    distiller = Distiller(teacher, RKD())
    with distiller.attached(student, "cpu"), counting() as (sizes, calls):
        x = torch.randn(rows, 4) + rank
        distiller.start()
        student(x)
        sum(distiller.compute_terms(Batch(x)).values()).backward()  # type: ignore[union-attr]
    return dict(sizes), dict(calls)


def test_bytes_and_collectives_of_a_step_are_those_of_the_cost_model(pool: Ranks) -> None:
    size = len(pool.pipes)
    expected = scaling.step_traffic(size, 6 * size, D_S, D_T), scaling.STEP_CALLS
    assert list(pool.run(step, 6)) == [expected] * size


def search(rank: int, size: int, per_rank: int, dim: int, memory: int) -> dict[str, int]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size * per_rank) % (size * per_rank // 4)
    rows = 9 * torch.randn(len(labels), dim, generator=generator)[labels]
    rows += torch.randn(len(labels), dim, generator=generator)
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    metric = EmbeddingRetrieval(working_memory=memory)
    metric.update(rows[own], labels[own])
    with counting() as (sizes, _):
        metric.compute()
    return dict(sizes)


@pytest.mark.parametrize("passes", [1, 3])
def test_bytes_of_a_search_are_those_of_the_cost_model(pool: Ranks, monkeypatch, passes: int) -> None:
    size, per_rank, dim, neighbours = len(pool.pipes), 60, 16, 3
    memory = (16 * dim + 80 * (neighbours + 4)) * per_rank // passes
    monkeypatch.setattr(scaling, "QUERY_MEMORY", memory)
    assert scaling.passes_of(per_rank, dim, neighbours) == passes
    expected = scaling.search_traffic(size, size * per_rank, dim, passes=passes)
    found = pool.run(search, size, per_rank, dim, memory)
    assert list(found) == [expected] * size


def test_the_page_on_scaling_has_the_tables_of_the_model() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert scaling.step_table() in page
    assert scaling.search_table() in page
