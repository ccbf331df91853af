"""Metrics on 1, 2 and 4 ranks: the same totals to the last digit, the rows spread out, and errors on all ranks."""

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
    AsymmetricRetrieval,
    EmbeddingRetrieval,
    FewShotAccuracy,
    RelationalAgreement,
    StoredGallery,
    _nearest,
    _rows,
    agreement,
    fewshot,
)
from tests.harness.ranks import Ranks

ROWS, WIDTH = 401, 12
Shares = list[list[int]]


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def pool(request: pytest.FixtureRequest, ranks: Ranks) -> Ranks:
    """Two ranks and, in the slow tests, four."""
    return ranks if request.param == 2 else request.getfixturevalue("four")  # type: ignore[no-any-return]


def columns(metric: str) -> tuple[Tensor, ...]:
    """All rows for the updates of a metric: values that tie, classes of many sizes."""
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
    if metric == "asymmetric":
        return x, labels, (x + torch.randn(ROWS, WIDTH, generator=generator)).round(decimals=1), index
    return (x, labels, index, is_query) if metric == "queries" else (x, labels, index)


def made(metric: str, options: dict[str, Any]) -> EmbeddingRetrieval | FewShotAccuracy | RelationalAgreement:
    if metric == "fewshot":
        return FewShotAccuracy(ways=3, shots=2, queries=3, episodes=31, **options)
    if metric == "agreement":
        return RelationalAgreement(k=3, **({"triplets": 1500, "max_anchors": 97} | options))
    if metric == "asymmetric":
        return AsymmetricRetrieval(k=(1, 4), **{"distance": "euclidean"} | options)
    if metric == "stored":
        rows, _, index = columns(metric)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))[5:]
        stored = StoredGallery(rows[order].round(), ids=index[order])
        return AsymmetricRetrieval(k=(1, 4), gallery=stored, **{"distance": "euclidean"} | options)
    return EmbeddingRetrieval(k=(1, 4), **options)


def updated(
    rank: int, metric: str, shares: Shares, options: dict[str, Any]
) -> EmbeddingRetrieval | FewShotAccuracy | RelationalAgreement:
    evaluation = made(metric, options)
    for rows in torch.tensor(shares[rank], dtype=torch.int64).split(64):
        if len(rows):
            given = [column[rows] for column in columns(metric)]
            evaluation.update(*given) if metric != "stored" else evaluation.update(*given[:2], indices=given[2])
    evaluation._update_count = 1  # an empty rank has none, and torchmetrics would warn
    return evaluation


def totals(rank: int, metric: str, shares: Shares, options: dict[str, Any]) -> list[float]:
    """Integers or float64 numbers from which the values are computed."""
    torch.set_num_threads(1)
    evaluation = updated(rank, metric, shares, options)
    if isinstance(evaluation, RelationalAgreement):
        found = evaluation._evaluate(torch.device("cpu")).tolist()
    elif isinstance(evaluation, FewShotAccuracy):
        found = evaluation._count_correct(torch.device("cpu")).tolist()
    else:
        with _rows.full_precision():
            sums, one = evaluation._totals(torch.device("cpu"))
        found = [*sums.tolist(), one, evaluation.left_out]
    assert sum(map(len, getattr(evaluation, evaluation._floats[0]))) == len(shares[rank]), "nothing was gathered"
    return found


def padded(size: int) -> Shares:
    """Rows as a distributed sampler deals them, with the first one repeated at the end."""
    return [list(DistributedSampler(range(ROWS), size, rank, shuffle=False)) for rank in range(size)]


SPLITS = {
    "padded": {2: padded(2), 4: padded(4)},
    "uneven": {2: [list(range(390)), list(range(390, ROWS))], 4: [[5], [], list(range(300, ROWS)), list(range(300))]},
    "one empty": {2: [[], list(range(ROWS))], 4: [list(range(ROWS)), [], [], []]},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("metric", ["retrieval", "queries", "asymmetric", "stored", "agreement", "fewshot"])
def test_totals_are_the_same_to_the_last_digit(pool: Ranks, metric: str, distance: str, split: str) -> None:
    size, options = len(pool.pipes), {"distance": distance}
    one = totals(0, metric, [list(range(ROWS))], options)
    assert len(set(one)) > 2
    memories = [{}] if metric == "agreement" else [{}, {"working_memory": 300_000}, {"working_memory": 30_000}]
    for memory in memories if split == "padded" else memories[-2:][:1]:
        assert list(pool.run(totals, metric, SPLITS[split][size], options | memory)) == [one] * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_stored_in_half_precision_give_the_same_totals_too(pool: Ranks, dtype: torch.dtype) -> None:
    size, options = len(pool.pipes), {"store_dtype": dtype}
    one = totals(0, "retrieval", [list(range(ROWS))], options)
    assert one != totals(0, "retrieval", [list(range(ROWS))], {})
    assert list(pool.run(totals, "retrieval", SPLITS["padded"][size], options)) == [one] * size


# memory


class Largest(TorchDispatchMode):
    """Size in bytes of the largest tensor that any operation returns."""

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


@pytest.mark.parametrize("metric", ["retrieval", "queries", "asymmetric", "stored", "agreement", "fewshot"])
def test_no_rank_ever_makes_a_tensor_as_large_as_its_share_and_half_of_it(pool: Ranks, metric: str) -> None:
    gallery, size = max(x.numel() * x.element_size() for x in columns(metric)), len(pool.pipes)
    assert largest(0, metric, [list(range(ROWS))]) >= gallery, "one rank holds it all: the measure sees it"
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
    """Rank 1 dies in the middle of the search."""
    if rank == 1:
        _nearest.Nearest.offer = lambda *args: os._exit(9)  # type: ignore[method-assign]
        agreement.compare_distances = lambda *args: os._exit(9)
        fewshot.count_correct = lambda *args: os._exit(9)
    updated(rank, metric, padded(2), {}).compute()


@pytest.mark.slow
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
