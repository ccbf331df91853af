"""Metrics on 1, 2 and 4 ranks: the same totals to the last digit, the rows spread out, and errors on all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from lightning_rkd.metrics import (
    EmbeddingRetrieval,
    FewShotAccuracy,
    RelationalAgreement,
    _nearest,
    _rows,
    agreement,
    fewshot,
)
from tests.harness.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ROWS, WIDTH = 401, 12
Shares = list[list[int]]


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    pool = Ranks(4)
    yield pool
    pool.close()


def columns(metric: str) -> tuple[Tensor, ...]:
    """What the metric is updated with, for all rows: values that tie, classes of many sizes."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, WIDTH, generator=generator).round(decimals=1)
    labels = torch.randint(60, (ROWS,), generator=generator) ** 2 // 60
    x = x + torch.randn(60, WIDTH, generator=generator)[labels]
    x[::19] = x[0]
    if metric == "fewshot":  # classes of enough samples
        labels = labels // 10
    index = torch.randperm(ROWS, generator=generator) * 3
    is_query = torch.rand(ROWS, generator=generator) < 0.4
    if metric == "agreement":
        return x @ torch.randn(WIDTH, 5, generator=generator), x, index
    return (x, labels, index, is_query) if metric == "queries" else (x, labels, index)


def made(metric: str, options: dict[str, Any]) -> EmbeddingRetrieval | FewShotAccuracy | RelationalAgreement:
    if metric == "fewshot":
        return FewShotAccuracy(ways=3, shots=2, queries=3, episodes=31, **options)
    if metric == "agreement":
        return RelationalAgreement(k=3, **({"triplets": 1500, "max_anchors": 97} | options))
    return EmbeddingRetrieval(k=(1, 4), **options)


def updated(
    rank: int, metric: str, shares: Shares, options: dict[str, Any]
) -> EmbeddingRetrieval | FewShotAccuracy | RelationalAgreement:
    evaluation = made(metric, options)
    for rows in torch.tensor(shares[rank], dtype=torch.int64).split(64):
        if len(rows):
            evaluation.update(*(column[rows] for column in columns(metric)))
    evaluation._update_count = 1  # an empty rank has none, and torchmetrics would warn
    return evaluation


def totals(rank: int, metric: str, shares: Shares, options: dict[str, Any]) -> list[float]:
    """What the values are computed from: integers, or float64."""
    torch.set_num_threads(1)
    evaluation = updated(rank, metric, shares, options)
    if isinstance(evaluation, RelationalAgreement):
        return evaluation._means(torch.device("cpu")).tolist()
    if isinstance(evaluation, FewShotAccuracy):
        return [float(n) for n in evaluation._count_correct(torch.device("cpu"))]
    with _rows.full_precision():
        sums, one = evaluation._totals(torch.device("cpu"))
    return [*sums.tolist(), one, evaluation.left_out]


def padded(size: int) -> Shares:
    """As a distributed sampler deals the rows, the first again at the end so that all ranks have as many."""
    return [list(DistributedSampler(range(ROWS), size, rank, shuffle=False)) for rank in range(size)]


SHARES = {2: padded(2), 4: padded(4)}
UNEVEN = {2: [list(range(390)), list(range(390, ROWS))], 4: [[5], [], list(range(300, ROWS)), list(range(300))]}


@pytest.mark.parametrize("shares", [SHARES, UNEVEN], ids=["padded", "uneven, one empty"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("metric", ["retrieval", "queries", "agreement", "fewshot"])
def test_totals_are_the_same_to_the_last_digit(
    ranks: Ranks, four: Ranks, metric: str, distance: str, shares: dict[int, Shares]
) -> None:
    block = {} if metric == "agreement" else {"working_memory": 300_000}
    options = {"distance": distance}
    one = totals(0, metric, [list(range(ROWS))], options)
    assert len(set(one)) > 2
    assert list(ranks.run(totals, metric, shares[2], options)) == [one] * 2
    assert list(four.run(totals, metric, shares[4], options | block)) == [one] * 4


def test_rows_stored_in_half_precision_give_the_same_totals_too(ranks: Ranks, four: Ranks) -> None:
    options = {"store_dtype": torch.bfloat16}
    one = totals(0, "retrieval", [list(range(ROWS))], options)
    assert one != totals(0, "retrieval", [list(range(ROWS))], {})
    assert list(ranks.run(totals, "retrieval", SHARES[2], options)) == [one] * 2
    assert list(four.run(totals, "retrieval", SHARES[4], options)) == [one] * 4


# memory


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gives back, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel() * x.element_size())
        return result


def largest(rank: int, metric: str, shares: Shares) -> int:
    torch.set_num_threads(1)
    agreement._ENTRIES, agreement._BLOCK, agreement._TRIPLETS = 2**9, 16, 8
    evaluation = updated(
        rank, metric, shares, {"triplets": 100} if metric == "agreement" else {"working_memory": 30_000}
    )
    if isinstance(evaluation, EmbeddingRetrieval):  # small classes: blocks are as wide as a few of them
        evaluation.labels = [part // 12 for part in evaluation.indices]
    try:
        with Largest() as seen:
            evaluation.compute()
    finally:
        agreement._ENTRIES, agreement._BLOCK, agreement._TRIPLETS = 2**21, 1024, 256
    return seen.size


@pytest.mark.parametrize("metric", ["retrieval", "queries", "agreement", "fewshot"])
def test_no_rank_ever_makes_a_tensor_as_large_as_its_share_and_half_of_it(
    ranks: Ranks, four: Ranks, metric: str
) -> None:
    gallery = max(x.numel() * x.element_size() for x in columns(metric))
    assert largest(0, metric, [list(range(ROWS))]) >= gallery, "one rank holds it all: the measure sees it"
    for size, pool in ((2, ranks), (4, four)):
        assert max(pool.run(largest, metric, padded(size))) < 1.5 * gallery / size


# faults


def spoiled(rank: int, metric: str, bad: int) -> Any:
    """One row of one rank turns NaN after the update, as a row on an accelerator is found only in ``compute``."""
    evaluation = updated(rank, metric, padded(2), {})
    if rank == bad:
        rows = evaluation.student if isinstance(evaluation, RelationalAgreement) else evaluation.embeddings
        rows[1][2] = torch.nan
    with pytest.raises(ValueError, match="row 66 of the embeddings that one rank holds has NaN or infinity"):
        evaluation.compute()
    return True


@pytest.mark.parametrize("metric", ["retrieval", "agreement", "fewshot"])
@pytest.mark.parametrize("bad", [0, 1])
def test_nan_on_one_rank_is_an_error_on_all(ranks: Ranks, metric: str, bad: int) -> None:
    assert list(ranks.run(spoiled, metric, bad)) == [True, True]


def dying(rank: int, metric: str) -> None:
    """Rank 1 is gone in the middle of the search."""
    if rank == 1:
        _nearest.Nearest.offer = lambda *args: os._exit(9)  # type: ignore[method-assign]
        agreement.compare_distances = lambda *args: os._exit(9)
        fewshot.count_correct = lambda *args: os._exit(9)
    updated(rank, metric, padded(2), {}).compute()


@pytest.mark.parametrize("metric", ["retrieval", "agreement", "fewshot"])
def test_a_rank_that_dies_in_the_middle_is_an_error_on_the_others(metric: str) -> None:
    pool = Ranks(2)
    try:
        for pipe in pool.pipes:
            pipe.send((dying, (metric,)))
        assert pool.pipes[0].poll(240), "rank 0 waits for ever"
        _, error = pool.pipes[0].recv()
        assert "RuntimeError" in error
        assert "Connection" in error
        pool.processes[1].join(10)
        assert pool.processes[1].exitcode == 9
    finally:
        pool.close()
