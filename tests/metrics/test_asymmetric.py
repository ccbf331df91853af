"""Queries of one network in the gallery of another: live, stored in files, or in a faiss index."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lightning_rkd.metrics import AsymmetricRetrieval, EmbeddingRetrieval, Faiss, RelationalAgreement, StoredGallery
from lightning_rkd.metrics.asymmetric import choose_gallery
from tests.harness.ranks import Ranks
from tests.oracles.retrieval import retrieval

SAMPLES, WIDTH = 90, 4


def rows(n: int = SAMPLES) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, labels and gallery rows in one space."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % 9
    student, teacher = (
        torch.randn(2, n, WIDTH, generator=generator) + torch.randn(9, WIDTH, generator=generator)[labels]
    )
    return student, labels, teacher


def values(metric: Any) -> dict[str, float]:
    return {name.removeprefix("asymmetric/"): float(value) for name, value in metric.compute().items()}


def evaluate(*columns: Any, indices: Any = None, is_query: Any = None, **options: Any) -> dict[str, float]:
    metric = AsymmetricRetrieval(k=(1, 3), **{"distance": "euclidean"} | options)
    metric.update(*columns, indices=indices, is_query=is_query)
    return values(metric)


# against the loop


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(
        st.tuples(
            *[st.lists(st.integers(-2, 2), min_size=2, max_size=2)] * 2,
            st.integers(0, 3),
            st.integers(0, 30),
            st.booleans(),
        ),
        min_size=2,
        max_size=20,
    ),
    with_indices=st.booleans(),
    with_queries=st.booleans(),
    self_match=st.booleans(),
    memory=st.integers(1, 10_000),
)
def test_equals_the_loop_with_ties_duplicates_and_padding(
    samples: Any, with_indices: bool, with_queries: bool, self_match: bool, memory: int
) -> None:
    if with_indices:  # one index is one sample
        first = {i: (s, t, y) for s, t, y, i, _ in reversed(samples)}
        samples = [(*first[i], i, is_query) for *_, i, is_query in samples]
    s, t, y, i, is_query = (list(column) for column in zip(*samples, strict=True))
    options = {"indices": i if with_indices else None, "is_query": is_query if with_queries else None}
    tensors = {name: None if column is None else torch.tensor(column) for name, column in options.items()}
    columns = torch.tensor(s).float(), torch.tensor(y), torch.tensor(t).float()
    given: dict[str, Any] = {"self_match": self_match, "working_memory": memory}
    try:
        expected = retrieval(s, y, **options, k=(1, 3), gallery_rows=t, self_match=self_match)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="queries has a row of its class"):
            evaluate(*columns, **tensors, **given)
        return
    assert evaluate(*columns, **tensors, **given) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_float64_brute_force_over_many_updates(distance: str) -> None:
    s, y, t = rows()
    metric = AsymmetricRetrieval(k=(1, 3), distance=distance)  # type: ignore[arg-type]
    for part in torch.arange(SAMPLES).split(17):
        metric.update(s[part], y[part], t[part])
    far = torch.cdist(s.double(), t.double())
    if distance == "cosine":
        far = -torch.nn.functional.normalize(s.double()) @ torch.nn.functional.normalize(t.double()).T
    far.fill_diagonal_(torch.inf)
    hits = y[far.argsort(dim=1)] == y[:, None]
    expected = {"recall_at_1": hits[:, 0].double().mean(), "recall_at_3": hits[:, :3].any(dim=1).double().mean()}
    found = values(metric)
    assert {name: found[name] for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()})
    assert found != values_of(s, y)


def values_of(x: Tensor, y: Tensor) -> dict[str, float]:
    metric = EmbeddingRetrieval(k=(1, 3))
    metric.update(x, y)
    return values(metric)


def test_of_one_network_it_is_embedding_retrieval() -> None:
    s, y, _ = rows()
    assert evaluate(s, y, s) == values_of(s, y)


def test_a_query_finds_its_own_sample_only_where_asked() -> None:
    x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
    assert evaluate(x, y, x, self_match=True)["recall_at_1"] == 1.0
    assert evaluate(x, y, x)["recall_at_1"] == 0.25  # all others are equally far: the first one wins


def test_rows_marked_as_queries_and_gallery_leave_out_their_own_index() -> None:
    s, y, t = rows()
    index, marks = torch.arange(SAMPLES).repeat(2), torch.arange(2 * SAMPLES) < SAMPLES
    metric = EmbeddingRetrieval(k=(1, 3))
    metric.update(torch.cat([s, t]), y.repeat(2), index, marks)
    assert values(metric) == evaluate(s, y, t)
    metric = EmbeddingRetrieval()
    metric.update(torch.cat([s, s]), y.repeat(2), index, marks)
    assert values(metric)["recall_at_1"] == values_of(s, y)["recall_at_1"] < 1  # was 1: each query found itself


def test_faiss_with_every_list_probed_is_the_exact_search() -> None:
    s, y, t = rows()
    assert evaluate(s, y, t, engine=Faiss(lists=5, probes=5)) == pytest.approx(evaluate(s, y, t), abs=1e-6)


def test_it_goes_with_agreement_into_a_collection() -> None:
    from torchmetrics import MetricCollection

    s, y, t = rows()
    metrics = MetricCollection({"asymmetric": AsymmetricRetrieval(), "agreement": RelationalAgreement()})
    metrics.update(queries=s, labels=y, gallery=t, student=s, teacher=t)
    assert {"asymmetric/recall_at_1", "neighbour_overlap_at_10"} < set(metrics.compute())


# galleries embedded before


def index_file(kind: str, folder: Path, t: Tensor, ids: Tensor) -> Path:
    flat = faiss.IndexFlatL2(WIDTH)
    made: Any = {
        "flat": lambda: flat,
        "flat with ids": lambda: faiss.IndexIDMap(flat),
        "flat with ids 2": lambda: faiss.IndexIDMap2(flat),
        "lists": lambda: faiss.IndexIVFFlat(flat, WIDTH, 3),
        "lists with ids": lambda: faiss.IndexIVFFlat(flat, WIDTH, 3),
    }[kind]()
    if "lists" in kind:
        made.train(t.numpy())
    made.add_with_ids(t.numpy(), ids.numpy()) if "ids" in kind else made.add(t.numpy())
    faiss.write_index(made, str(folder / "rows.faiss"))
    return folder / "rows.faiss"


@pytest.mark.parametrize("kind", ["flat", "flat with ids", "flat with ids 2", "lists", "lists with ids"])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_faiss_index_is_the_gallery(kind: str, labelled: bool, tmp_path: Path) -> None:
    s, y, t = rows()
    order = torch.randperm(SAMPLES) if "ids" in kind else torch.arange(SAMPLES)
    path = index_file(kind, tmp_path, t[order], order)
    # rows of lists with ids come in the order of their ids
    labels = (y if kind == "lists with ids" else y[order]) if labelled else None
    gallery = StoredGallery(str(path), labels=labels)
    assert evaluate(s, y, gallery=gallery, indices=torch.arange(SAMPLES)) == evaluate(s, y, t)


@pytest.mark.parametrize("kind", ["tensor", "array", "npy", "safetensors"])
def test_a_stored_array_is_the_gallery(kind: str, tmp_path: Path) -> None:
    s, y, t = rows()
    order = torch.randperm(SAMPLES)
    np.save(tmp_path / "rows.npy", t[order].numpy())
    np.save(tmp_path / "ids.npy", order.numpy())
    save_file({"t": t[order], "ids": order, "labels": y[order]}, tmp_path / "rows.safetensors")
    gallery = {
        "tensor": lambda: StoredGallery(t[order], ids=order),
        "array": lambda: StoredGallery(t[order].numpy(), ids=order.tolist(), labels=y[order].numpy()),
        "npy": lambda: StoredGallery(tmp_path / "rows.npy", tmp_path / "ids.npy"),
        "safetensors": lambda: StoredGallery(tmp_path / "rows.safetensors"),
    }[kind]()
    indices = torch.arange(SAMPLES)
    assert evaluate(s, y, gallery=gallery, indices=indices) == evaluate(s, y, t, indices=indices)
    own = retrieval(s.tolist(), y.tolist(), k=(1, 3), gallery_rows=t.tolist(), self_match=True)
    assert evaluate(s, y, gallery=gallery, indices=indices, self_match=True) == pytest.approx(own, abs=1e-6)
    if kind in ("npy", "safetensors"):
        assert len(pickle.dumps(gallery)) < 500
        assert deepcopy(gallery) is gallery


def test_rows_of_other_samples_belong_to_a_labelled_gallery_only() -> None:
    s, y, t = rows()
    seen = torch.arange(SAMPLES) < 40  # the rest is in the gallery, but not evaluated
    ids = torch.where(seen, torch.arange(SAMPLES), -1)
    labelled = StoredGallery(t, ids=ids, labels=y)
    given = {"indices": torch.arange(40), "gallery": labelled}
    everything = retrieval(
        torch.cat([s[:40], s]).tolist(),
        torch.cat([y[:40], y]).tolist(),
        [*range(40), *range(SAMPLES)],
        [True] * 40 + [False] * SAMPLES,
        k=(1, 3),
        gallery_rows=torch.cat([t[:40], t]).tolist(),
    )
    assert evaluate(s[:40], y[:40], **given) == pytest.approx(everything, abs=1e-6)
    few = StoredGallery(t[ids >= 0], ids=ids[ids >= 0])
    assert evaluate(s[:40], y[:40], indices=torch.arange(40), gallery=few) == evaluate(s[:40], y[:40], t[:40])


def spoiled(rank: int, last: float) -> str:
    """A NaN in the share of the last rank."""
    s, y, t = rows()
    t[-1, 0] = last
    metric = AsymmetricRetrieval(gallery=StoredGallery(t))
    metric.update(s[rank::2], y[rank::2], indices=torch.arange(SAMPLES)[rank::2])
    with pytest.raises((ValueError, RuntimeError), match="NaN or infinity") as error:
        metric.compute()
    return str(error.value)


def test_a_row_with_nan_in_a_stored_gallery_is_an_error_on_all_ranks(ranks: Ranks) -> None:
    assert all("the stored gallery: row" in message for message in ranks.run(spoiled, float("nan")))


# what cannot work

WIDE, X, Y = torch.randn(4, 7), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
STORED = StoredGallery(X)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ((X, Y, WIDE), {}, r"width 5 and gallery rows width 7: .* loss\.project\(queries\)"),
        ((WIDE, Y), {"gallery": STORED, "indices": torch.arange(4)}, "width 7 and gallery rows width 5"),
        ((X, Y), {}, r"the gallery is missing: pass the teacher's rows .* update\(queries, labels, gallery\)"),
        ((X, Y, X), {"gallery": STORED}, "given twice, here and as a StoredGallery"),
        ((X, Y), {"gallery": STORED}, r"may hold the queries' own samples: pass indices="),
        ((X, Y, X[:3]), {}, "queries has 4 rows, but gallery has 3"),
        ((X, Y, X * torch.nan), {}, "gallery: row 0 of this update holds NaN"),
        (
            (X, Y),
            {"gallery": StoredGallery(X, labels=[0, 1, 1, 1]), "indices": torch.arange(4)},
            "the sample 1 has label 0 in the batches and 1 in the stored gallery: ids must be rows",
        ),
        ((X, Y), {"gallery": StoredGallery(X, [9, 8, 7, 6]), "indices": torch.arange(4)}, "none of 4 queries"),
    ],
)
def test_wrong_use_names_what_came_and_the_cure(columns: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(*columns, **options)


def test_galleries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.faiss").write_bytes(b"no")
    products = faiss.IndexFlatIP(2)
    products.add(np.eye(2, dtype=np.float32))
    faiss.write_index(products, str(tmp_path / "products.faiss"))
    for arguments, error, message in (
        ((X[0],), ValueError, r"StoredGallery takes floating point \(N, D\)"),
        ((X, [1, 2]), ValueError, "ids must be 4 integers"),
        ((X, [1, 2, 2, 3]), ValueError, "the id 2 is given twice"),
        ((X, None, [0]), ValueError, "labels must be 4 integers"),
        ((tmp_path / "none.npy",), FileNotFoundError, "do not exist"),
        ((tmp_path / "none.faiss",), FileNotFoundError, "does not exist"),
        ((tmp_path / "cut.faiss",), ValueError, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            StoredGallery(*arguments)
    stored = StoredGallery(tmp_path / "products.faiss")
    assert AsymmetricRetrieval(gallery=stored).names[0] == "asymmetric/recall_at_1"
    with pytest.raises(ValueError, match="the index compares inner products: pass distance='cosine'"):
        AsymmetricRetrieval("euclidean", gallery=stored)


def test_a_chosen_gallery_keeps_the_arguments_of_a_metric() -> None:
    own = EmbeddingRetrieval((1, 5), "cosine", 1000, torch.float16, value="recall_at_5")
    chosen = choose_gallery({"r": own, "a": RelationalAgreement()}, "teacher")
    assert list(chosen) == ["asymmetric/r", "a"]
    made: Any = chosen["asymmetric/r"]
    assert (made.k, made.distance, made.working_memory) == ((1, 5), "cosine", 1000)
    assert (made.store_dtype, made.value) == (torch.float16, "asymmetric/recall_at_5")
    with pytest.raises(ValueError, match=r"\(no subclass\), but the metrics are .*: add EmbeddingRet"):
        choose_gallery({"a": RelationalAgreement()}, "both")
    with pytest.raises(ValueError, match=r"'teacher', 'both' or StoredGallery\(rows\), got 'techer'"):
        choose_gallery({"r": own}, "techer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"StoredGallery\(rows\), got tensor\(.{70,80}$"):
        choose_gallery({"r": own}, torch.ones(99))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be 2 integers, or a path"):
        StoredGallery(torch.eye(2), labels=["cat", "dog"])  # type: ignore[arg-type]
