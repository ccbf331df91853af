import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor

from lightning_rkd.metrics import EmbeddingRetrieval, _nearest
from tests.harness.forks import run_code
from tests.harness.ranks import Ranks
from tests.oracles.retrieval import retrieval

PEER = {"recall_at_1": "precision_at_1", "map_at_r": "mean_average_precision_at_r", "r_precision": "r_precision"}


def blobs(n: int, d: int, classes: int, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    labels = torch.randint(classes, (n,))
    return torch.randn(classes, d)[labels] + noise * torch.randn(n, d), labels


def values(metric: EmbeddingRetrieval) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def evaluate(*columns: Any, **options: Any) -> dict[str, float]:
    metric = EmbeddingRetrieval(**options)
    metric.update(*columns)
    return values(metric)


# against others


def peer(knn: CustomKNN | None = None) -> AccuracyCalculator:
    options = {"knn_func": knn} if knn else {}
    return AccuracyCalculator(include=tuple(PEER.values()), k="max_bin_count", device=torch.device("cpu"), **options)


def in_our_words(theirs: dict[str, float]) -> dict[str, float]:
    return {name: theirs[their_name] for name, their_name in PEER.items()}


def test_equals_pytorch_metric_learning_with_faiss() -> None:
    x, y = blobs(1200, 24, 300)
    assert evaluate(x, y) == pytest.approx(in_our_words(peer().get_accuracy(x, y)), abs=1e-6)


@pytest.mark.parametrize("classes", [3, 20])
def test_equals_pytorch_metric_learning_in_float64_with_many_neighbours(classes: int) -> None:
    # given float32 rows, faiss swaps near ties among 60 neighbours: 1e-5 away from the loop, which we equal
    x, y = blobs(1200, 24, classes)
    theirs = peer(CustomKNN(LpDistance(normalize_embeddings=False))).get_accuracy(x.double(), y)
    assert evaluate(x, y) == evaluate(x, y, working_memory=500_000) == pytest.approx(in_our_words(theirs), abs=1e-6)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_pytorch_metric_learning_with_query_and_gallery(distance: str) -> None:
    x, y = blobs(900, 16, 40)
    is_query = torch.rand(900) < 0.3
    knn = CustomKNN(CosineSimilarity()) if distance == "cosine" else None
    theirs = peer(knn).get_accuracy(x[is_query], y[is_query], x[~is_query], y[~is_query])
    assert evaluate(x, y, None, is_query, distance=distance) == pytest.approx(in_our_words(theirs), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-2, 2), min_size=2, max_size=2), st.integers(0, 3), st.integers(0, 30), st.booleans()
        ),
        min_size=2,
        max_size=24,
    ),
    with_indices=st.booleans(),
    with_queries=st.booleans(),
    cosine=st.booleans(),
    memory=st.integers(1, 10_000),
    splits=st.lists(st.integers(0, 24), max_size=3),
    shuffle=st.randoms(use_true_random=False),
)
def test_equals_the_loop_with_ties_and_duplicates_in_any_order_and_memory(
    rows: Any, with_indices: bool, with_queries: bool, cosine: bool, memory: int, splits: list[int], shuffle: Any
) -> None:
    # one index is one sample: its row and label follow from the first that has it
    first = {(i, is_query and with_queries): x for x, _, i, is_query in reversed(rows)}
    label = {i: y for _, y, i, _ in rows}
    if with_indices:
        rows = [(first[i, is_query and with_queries], label[i], i, is_query) for _, _, i, is_query in rows]
    if cosine:  # directions that are exact in floating point, so that the loop sees the same ties
        rows = [([x[0], 0] if x[0] else [0, x[1]], y, i, is_query) for x, y, i, is_query in rows]
    x, y, i, is_query = (list(column) for column in zip(*rows, strict=True))
    options = {"indices": i if with_indices else None, "is_query": is_query if with_queries else None}
    try:
        expected = retrieval(x, y, **options, k=(1, 3), cosine=cosine)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="queries has a row of its class"):
            evaluate(torch.tensor(x).float(), torch.tensor(y), *_tensors(options))
        return
    if with_indices:
        shuffle.shuffle(rows)
        x, y, i, is_query = (list(column) for column in zip(*rows, strict=True))
        options = {"indices": i, "is_query": is_query if with_queries else None}
    metric = EmbeddingRetrieval(k=(1, 3), distance="cosine" if cosine else "euclidean", working_memory=memory)
    columns = (torch.tensor(x).float(), torch.tensor(y), *_tensors(options))
    cuts = sorted({0, *(min(cut, len(x)) for cut in splits), len(x)})
    for start, stop in itertools.pairwise(cuts):
        metric.update(*(c if c is None else c[start:stop] for c in columns))
    assert values(metric) == pytest.approx(expected, abs=1e-6)


def _tensors(options: dict[str, Any]) -> list[Tensor | None]:
    return [None if column is None else torch.tensor(column) for column in options.values()]


def test_values_worked_out_by_hand() -> None:
    # from 0: 1 (same), 3, 4 (same); from 1: 0 (same), 3, 4 (same); from 4: 3, 1 (same), 0 (same); 3 is alone
    metric = EmbeddingRetrieval(k=(1, 2))
    metric.update(torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 0]))
    assert values(metric) == pytest.approx(
        {"recall_at_1": 2 / 3, "recall_at_2": 1.0, "map_at_r": (0.5 + 0.5 + 0.25) / 3, "r_precision": 0.5}
    )
    assert metric.left_out == 1


@pytest.mark.parametrize("with_indices", [False, True])
def test_left_out_counts_queries_without_a_row_of_their_class(with_indices: bool) -> None:
    metric = EmbeddingRetrieval()
    y = torch.tensor([0, 1, 2, 2, 0, 3, 3])  # of the queries 0, 1, 2, 2 the gallery 0, 3, 3 has one class
    is_query = torch.arange(7) < 4
    metric.update(torch.arange(7.0)[:, None], y, torch.arange(7) if with_indices else None, is_query)
    assert values(metric)["recall_at_1"] == 1.0
    assert metric.left_out == 3


# ties and numerics


def test_ties_go_to_the_lower_index_and_without_indices_to_the_earlier_row() -> None:
    x, y = torch.tensor([[0.0], [1.0], [-1.0]]), torch.tensor([0, 1, 0])
    is_query = torch.tensor([True, False, False])
    assert evaluate(x, y, None, is_query)["recall_at_1"] == 0.0
    assert evaluate(x[[0, 2, 1]], y[[0, 2, 1]], None, is_query)["recall_at_1"] == 1.0
    assert evaluate(x, y, torch.tensor([0, 2, 1]), is_query)["recall_at_1"] == 1.0


@pytest.mark.parametrize("memory", [1_000, 6_000, 500_000, 2**27])
@pytest.mark.parametrize("collapsed", [True, False], ids=["collapsed", "binary codes"])
def test_rows_full_of_ties_equal_the_loop(collapsed: bool, memory: int) -> None:
    x = torch.full((120, 12), 0.1) if collapsed else (torch.rand(120, 12) < 0.5).float() * 2 - 1
    y = torch.randint(6, (120,))
    expected = retrieval(x.tolist(), y.tolist(), k=(1, 5))
    assert evaluate(x, y, working_memory=memory, k=(1, 5)) == pytest.approx(expected, abs=1e-6)


def test_one_far_outlier_changes_nothing_for_the_others() -> None:
    x, y = blobs(200, 8, 20)
    far, lone = torch.full((1, 8), 1e9), torch.tensor([99])
    assert evaluate(torch.cat([x, far]), torch.cat([y, lone])) == pytest.approx(evaluate(x, y))


def test_neighbours_closer_than_float32_can_tell_are_ordered_in_float64() -> None:
    y = torch.tensor([0, 1, 0])
    x = torch.tensor([[0.0, 0.0], [1.0 + 1e-12, 0.0], [1.0, 0.0]], dtype=torch.float64)
    is_query = torch.tensor([True, False, False])
    assert evaluate(x, y, None, is_query)["recall_at_1"] == 1.0
    assert evaluate(x[:, [1, 0]], y, None, is_query)["recall_at_1"] == 1.0


def test_a_zero_row_has_cosine_zero_with_everything() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [-1.0, 1.0]])
    is_query = torch.tensor([True, False, False, False])
    for label_of_nearest, expected in ((2, 1.0), (1, 0.0)):
        y = torch.zeros(4, dtype=torch.int64)
        y[1:] = 1
        y[label_of_nearest] = 0
        assert evaluate(x, y, None, is_query, distance="cosine")["recall_at_1"] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_up_to_the_rounding_of_the_rows(dtype: torch.dtype) -> None:
    x, y = blobs(400, 16, 300)  # labels above 256 would not survive bfloat16
    expected = evaluate(x.to(dtype).float(), y, torch.arange(400))
    converted, cast, stored = (EmbeddingRetrieval(store_dtype=d) for d in (None, None, dtype))
    for metric in (converted, cast, stored):
        metric.update(x[:150], y[:150], torch.arange(150))
        if metric is converted:
            metric.to(dtype)
        if metric is cast:
            metric.set_dtype(dtype)
        metric.update(x[150:].to(torch.float32 if metric is stored else dtype), y[150:], torch.arange(150, 400))
        assert values(metric) == expected
        assert metric.labels[0].dtype is torch.int64
        assert metric.compute()["map_at_r"].dtype is torch.float32
    assert stored.embeddings[0].dtype is dtype


@pytest.mark.parametrize("word", ["medium", "highest"])
def test_reduced_matmul_precision_and_autocast_do_not_reach_the_search(word: str) -> None:
    x, y = blobs(300, 32, 30)
    expected, before = evaluate(x, y), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(word)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert evaluate(x, y) == expected
        assert torch.get_float32_matmul_precision() == word
    finally:
        torch.set_float32_matmul_precision(before)


# ranks


def _on_rank(rank: int, shares: list[Any], options: dict[str, Any]) -> dict[str, float]:
    return evaluate(*shares[rank], **options)


def test_without_indices_two_processes_equal_one_that_sees_rank_0_first(ranks: Ranks) -> None:
    x, y = blobs(60, 5, 12)
    x[::7] = x[0]  # ties over ranks
    shares = [(x[:25], y[:25]), (x[25:], y[25:])]
    assert list(ranks.run(_on_rank, shares, {"working_memory": 10_000})) == [evaluate(x, y)] * 2


def test_ranks_that_do_not_fit_are_told_on_every_rank(ranks: Ranks) -> None:
    y, index = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    wider, without = (torch.zeros(4, 3), y, index), (torch.zeros(4, 2), y)
    for other, message in ((wider, "different widths"), (without, "some ranks were given")):
        with pytest.raises(RuntimeError, match=rf"(?s)rank 0.*{message}.*rank 1.*{message}"):
            ranks.run(_on_rank, [(torch.zeros(4, 2), y, index), other], {})


# as a torchmetrics.Metric


def test_updates_go_on_after_compute_and_keep_no_graph() -> None:
    x, y = blobs(60, 4, 5)
    metric = EmbeddingRetrieval()
    metric(x[:20].clone().requires_grad_(), y[:20])
    assert not metric.compute()["map_at_r"].requires_grad
    with torch.inference_mode():
        metric(x[20:] * 1, y[20:])
    assert values(metric) == evaluate(x, y)


def test_reset_clone_pickle_and_state_dict_keep_or_drop_the_rows() -> None:
    x, y = blobs(50, 4, 5)
    metric = EmbeddingRetrieval(k=(1, 2), distance="cosine")
    assert metric.state_dict() == {}
    metric.persistent(True)
    metric.update(x, y, torch.arange(50))
    expected = values(metric)
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        twin._computed = None
        assert values(twin) == expected
    loaded = EmbeddingRetrieval(k=(1, 2), distance="cosine")
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded._update_count = 1
    assert values(loaded) == expected
    metric.reset()
    assert metric.embeddings == metric.labels == metric.indices == []
    metric.update(2 * x, y)  # indices may come or not, anew
    assert values(metric) == pytest.approx(evaluate(x, y, k=(1, 2), distance="cosine"))


def test_rows_are_copied_so_the_caller_may_reuse_its_buffer() -> None:
    x, y = blobs(60, 4, 5)
    metric, buffer = EmbeddingRetrieval(), torch.empty(30, 2, 4)
    for part in (slice(0, 30), slice(30, 60)):
        buffer[:, 0] = x[part]
        metric.update(buffer[:, 0], y[part])
    assert metric.embeddings[0].untyped_storage().nbytes() == 30 * 4 * 4
    assert values(metric) == evaluate(x, y)


# mistakes

Y = torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((torch.zeros(3, 2, 1, 1), Y), r"embeddings must be \(N, D\), got \(3, 2, 1, 1\)"),
        ((torch.zeros(3, 2, dtype=torch.int64), Y), "must be floating point, got torch.int64"),
        ((torch.zeros(3, 2), Y[:2]), "labels has 2 rows, but the embeddings have 3"),
        ((torch.zeros(3, 2), Y.float()), r"labels must be \(N,\) of integer type"),
        ((torch.zeros(3, 2), Y.to("meta")), "labels are on the meta device"),
        ((torch.zeros(3, 2), Y, Y.to("meta")), "indices are on the meta device"),
        ((torch.zeros(3, 2), Y, Y[:1]), "indices has 1 rows"),
        ((torch.zeros(3, 2), Y, None, Y), r"is_query must be \(N,\) of bool type"),
        ((torch.tensor([[0.0], [torch.nan], [0.0]]), Y), "row 1 of this update holds NaN or infinity"),
        ((torch.tensor([[0.0], [0.0], [-torch.inf]]), Y), "row 2 of this update"),
    ],
)
def test_a_bad_update_is_refused_and_leaves_the_state_alone(columns: tuple[Any, ...], message: str) -> None:
    metric = EmbeddingRetrieval()
    with pytest.raises(ValueError, match=message):
        metric.update(*columns)
    assert metric.embeddings == metric.labels == metric.indices == metric.is_query == []


def test_a_row_that_overflows_in_storage_is_named() -> None:
    metric = EmbeddingRetrieval(store_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"row 0 .* once stored in torch.float16"):
        metric.update(torch.full((1, 2), 1e6), Y[:1])


def test_updates_must_be_alike() -> None:
    x = torch.zeros(3, 2)
    metric = EmbeddingRetrieval()
    metric.update(x, Y, torch.arange(3))
    with pytest.raises(ValueError, match="indices must come with every update or with none"):
        metric.update(x, Y)
    with pytest.raises(ValueError, match="is_query must come with every update or with none"):
        metric.update(x, Y, torch.arange(3), Y == 0)
    with pytest.raises(ValueError, match="width 2 in an earlier update and have width 5 now"):
        metric.update(torch.zeros(3, 5), Y, torch.arange(3))


def test_one_index_with_two_labels_is_refused() -> None:
    metric = EmbeddingRetrieval()
    metric.update(torch.zeros(3, 2), Y, torch.tensor([4, 7, 7]))
    with pytest.raises(ValueError, match="index 7 came with labels 0 and 1"):
        metric.compute()


def test_no_query_with_a_relevant_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 3 queries has a row of its class among 3 gallery rows"):
        evaluate(torch.zeros(3, 2), torch.arange(3))
    with pytest.raises(ValueError, match="none of 3 queries has a row of its class among 0 gallery rows"):
        evaluate(torch.zeros(3, 2), Y, None, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"k": ()}, {"k": (1, 1)}, {"distance": "manhattan"}, {"working_memory": 0}, {"store_dtype": torch.int8}],
)
def test_a_bad_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EmbeddingRetrieval(**options)


# the native scan


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("per_class", [5, 200])
@pytest.mark.parametrize("levels", [2, 10, 10**6], ids=["codes full of ties", "many ties", "hardly a tie"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_are_the_same_in_any_memory_with_and_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, levels: int, per_class: int, distance: str
) -> None:
    x, y = (torch.randn(600, 6) * levels).round().to(dtype), torch.arange(600) % (600 // per_class)

    def totals(memory: int) -> tuple[int, ...]:
        metric = EmbeddingRetrieval(k=(1, 5), distance=distance, working_memory=memory)
        metric.update(x, y)
        return tuple(metric._totals(torch.device("cpu"))[0].tolist())

    found = {totals(memory) for memory in (30_000, 2**50)}
    monkeypatch.setattr(_nearest, "native", lambda name: None)
    assert len(found | {totals(memory) for memory in (300_000, 2**27)}) == 1


_GROWTH = """
import sys
from pathlib import Path

import torch

from lightning_rkd.metrics import EmbeddingRetrieval

def status(line):
    return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) / 1024

def measured(rows, asking, dim, per_class, levels, memory):
    metric = EmbeddingRetrieval(working_memory=memory * 2**20)
    x = torch.randn(rows, dim).mul_(levels).round_()
    metric.update(x, torch.arange(rows) % (rows // per_class), is_query=torch.arange(rows) < asking)
    del x
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    metric.compute()
    return status("VmHWM") - before

torch.set_num_threads(1)
measured(2000, 1000, 8, 10, 1000, 1)
print(measured(*map(int, sys.argv[1:])))
"""


def grown(*numbers: int) -> float:
    """MiB by which a process grows in ``compute``."""
    return float(run_code(_GROWTH, *map(str, numbers)))


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("numbers", "copy"),
    [((6000, 3000, 512, 600, 1000), 5.9), ((8000, 4000, 16, 800, 1), 0.2)],
    ids=["wide rows with many neighbours", "codes full of ties"],
)
def test_a_search_grows_by_no_more_than_its_working_memory(numbers: tuple[int, ...], copy: float) -> None:
    assert grown(*numbers, 16) < 16 + copy + 4, "MiB: the blocks, a copy of the gallery, and what each row needs"


@pytest.mark.slow
@needs_proc
def test_memory_does_not_grow_with_queries_times_gallery() -> None:
    small, large = (grown(gallery + 1000, 1000, 8, 10, 1000, 32) for gallery in (20_000, 120_000))
    # 100,000 gallery rows more: their scores would take 380 MiB, the rows take 3, their labels and places some more
    assert large - small < 60, (small, large)
