import os
import subprocess
import sys
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor

from lightning_rkd.metrics import EmbeddingRetrieval, Faiss
from tests.harness.platforms import linux_only
from tests.harness.ranks import Ranks

EVERYTHING = Faiss(lists=20, probes=20)


def blobs(n: int, width: int, per_class: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    labels = torch.randperm(n) % (n // per_class)
    return torch.randn(n // per_class, width)[labels] + noise * torch.randn(n, width), labels


def evaluate(*columns: Any, **options: Any) -> dict[str, float]:
    metric = EmbeddingRetrieval(**options)
    metric.update(*columns)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("per_class", [5, 150])
def test_with_every_list_probed_it_is_the_exact_search(per_class: int, queries: bool, distance: str) -> None:
    x, y = blobs(1500, 8, per_class)
    index = torch.randperm(1500)
    columns = [torch.cat([c, c[:40]]) for c in (x, y, index, torch.rand(1500) < 0.3)]  # 40 rows come twice
    options = {"k": (1, 4), "distance": distance}
    exact = evaluate(*columns[: 4 if queries else 3], **options)
    assert evaluate(*columns[: 4 if queries else 3], **options, engine=EVERYTHING) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [*((d, 0.0, 1.0) for d in (torch.float16, torch.bfloat16, torch.float64)),
     *((torch.float32, offset, scale) for offset, scale in ((1000.0, 1.0), (0.0, 1e25), (0.0, 1e-30)))],
)  # fmt: skip
def test_precision_offset_and_magnitude_are_no_matter(dtype: torch.dtype, offset: float, scale: float) -> None:
    x, y = blobs(1200, 16, 5)
    x = x * scale + offset
    exact = evaluate(x, y, store_dtype=dtype)
    assert evaluate(x, y, store_dtype=dtype, engine=EVERYTHING) == pytest.approx(exact, abs=1e-5)


def test_values_are_those_of_the_neighbours_that_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(1500, 8, 10, noise=0.5)
    found: dict[int, list[int]] = {}
    search = Faiss.search

    def watched(*args: Any) -> Any:
        for query, scores, places in search(*args):
            for q, s, p in zip(query.tolist(), scores.tolist(), places.tolist(), strict=True):
                found[q] = [place for score, place in zip(s, p, strict=True) if score < float("inf")]
            yield query, scores, places

    monkeypatch.setattr(Faiss, "search", watched)
    values = evaluate(x, y, engine=Faiss(lists=300, probes=1), working_memory=50_000)
    assert sorted(found) == list(range(1500))
    assert all(q not in near and len(set(near)) == len(near) <= 9 for q, near in found.items())
    apart = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").tolist()
    assert all(near == sorted(near, key=lambda g: apart[q][g]) for q, near in found.items())
    same = {q: [int(y[g] == y[q]) for g in near] for q, near in found.items()}
    assert values["recall_at_1"] == pytest.approx(sum(hits[:1] == [1] for hits in same.values()) / 1500)
    assert values["r_precision"] == pytest.approx(sum(sum(hits) / 9 for hits in same.values()) / 1500)
    precision = [sum(hit * sum(h[: j + 1]) / (j + 1) for j, hit in enumerate(h)) / 9 for h in same.values()]
    assert values["map_at_r"] == pytest.approx(sum(precision) / 1500)
    assert values != evaluate(x, y), "so few lists miss something"


def test_by_default_it_is_close_to_exact_on_rows_in_clusters() -> None:
    x, y = blobs(12_000, 32, 10, noise=0.6)
    exact, found = evaluate(x, y), evaluate(x, y, engine=Faiss())
    assert 0.2 < exact["map_at_r"] < 0.95
    assert found == pytest.approx(exact, abs=0.02)
    assert found != exact


def test_as_many_lists_are_probed_as_wide_neighbourhoods_need() -> None:
    x, y = torch.randn(1200, 6), torch.arange(1200) % 3
    few = evaluate(x, y, engine=Faiss(lists=40, probes=1))
    assert few == pytest.approx(evaluate(x, y), abs=1e-5)  # 400 of 1,200 rows: all lists are needed


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_collapsed_network_and_a_handful_of_rows_are_evaluated(distance: str) -> None:
    y = torch.arange(400) % 4
    values = evaluate(torch.full((400, 8), 0.1), y, distance=distance, engine=Faiss())
    assert all(0 <= value <= 1 for value in values.values())
    x, y = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]), torch.tensor([0, 0, 1])
    assert evaluate(x, y, distance=distance, engine=Faiss()) == evaluate(x, y, distance=distance)


def test_totals_are_the_same_whatever_the_working_memory() -> None:
    x, y = blobs(1500, 8, 10)
    small, large = (evaluate(x, y, engine=Faiss(probes=4), working_memory=memory) for memory in (100_000, 2**27))
    assert small == pytest.approx(large, abs=1e-3)  # few queries at a time take another product to the centres


def test_a_configuration_names_it() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EmbeddingRetrieval, "metric")
    given = parser.parse_args(["--metric.engine=lightning_rkd.metrics.Faiss", "--metric.engine.probes=5"])
    assert parser.instantiate(given).metric.engine == Faiss(probes=5)


# mistakes


@pytest.mark.parametrize("option", [{"lists": 0}, {"probes": 0}, {"probes": 2.5}])
def test_a_bad_option_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be a whole number of at least 1"):
        Faiss(**option)
    with pytest.raises(ValueError, match=r"engine must be None \(exact\) or Faiss\(\), got 'faiss'"):
        EmbeddingRetrieval(engine="faiss")  # type: ignore[arg-type]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rkd\[faiss\]'"):
        Faiss()
    x, y = blobs(40, 4, 5)
    assert evaluate(x, y)["recall_at_1"] >= 0, "the exact search needs none"


def _refused(rank: int) -> bool:
    metric = EmbeddingRetrieval(engine=Faiss())
    for call in (lambda: metric.update(*blobs(40, 4, 5)), lambda: metric._totals(torch.device("cpu"))):
        with pytest.raises(ValueError, match=r"one process, but there are 2; evaluate on one device, Trainer\(dev"):
            call()
    return True


def test_several_ranks_are_refused_on_each(ranks: Ranks) -> None:
    assert list(ranks.run(_refused)) == [True, True]


_BOTH = """
import sys
for name in sys.argv[1:]:
    __import__(name)
import faiss
import torch
from torch.utils.data import DataLoader
from lightning_rkd.metrics import EmbeddingRetrieval, Faiss, _faiss

before = faiss.omp_get_max_threads()
torch.set_num_threads(2)
x = torch.randn(2000, 16)
x.requires_grad_()
values = []
for engine in (None, Faiss(lists=10, probes=10)) * 3:
    (x @ x.T).square().mean().backward()
    metric = EmbeddingRetrieval(engine=engine)
    # workers fork from a process in which both have started their threads
    for rows in DataLoader(x.detach(), batch_size=500, num_workers=2, multiprocessing_context="fork"):
        assert bool((rows @ rows.T).isfinite().all())
        metric.update(rows, torch.arange(len(rows)) % 50)
    values.append(round(float(metric.compute()["map_at_r"]), 5))
assert len(set(values)) == 1, values
alone = sys.argv[1] == "faiss"  # imported later, it takes the OpenMP that PyTorch brought
with _faiss._use_threads_of_pytorch():
    assert faiss.omp_get_max_threads() == 2
assert faiss.omp_get_max_threads() == (before if alone else 2)
print("done")
"""


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("order", [("faiss", "torch"), ("torch", "faiss")], ids=" then ".join)
def test_two_openmp_libraries_neither_crash_nor_hang_and_agree_on_threads(order: tuple[str, str]) -> None:
    command, environment = [sys.executable, "-c", _BOTH, *order], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert run.stdout == "done\n", run.stderr[-2000:]
