"""The smallest entries of each row against a plain sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rkd.functional._kernels import native
from lightning_rkd.metrics import _nearest
from lightning_rkd.metrics._nearest import LAST, Nearest

scan = native("scan")
pytestmark = pytest.mark.skipif(scan is None, reason="there is no numba")


def by_sorting(scores: Tensor, places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of numpy's sort by two keys, the first ``width``."""
    found = torch.full((len(scores), width), torch.inf, dtype=scores.dtype), torch.full((len(scores), width), LAST)
    for row, line in enumerate(scores):
        order = torch.from_numpy(np.lexsort((places.numpy(), line.numpy()))[:width].copy())
        found[0][row, : len(order)], found[1][row, : len(order)] = line[order], places[order]
    return found


@pytest.fixture(params=[scan, None], ids=["native", "PyTorch"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nearest, "native", lambda name: request.param)
    assert (Nearest(1, 1, torch.float32, torch.device("cpu"))._kept is None) == (request.param is None)


def check(scores: Tensor, width: int, block: int, places: Tensor | None = None) -> None:
    places = torch.randperm(scores.shape[1]) if places is None else places
    nearest = Nearest(len(scores), width, scores.dtype, scores.device)
    for part, where in zip(scores.split(block, dim=1), places.split(block), strict=True):
        nearest.offer(part.clone(), where)
    for found, expected in zip(nearest.in_order(), by_sorting(scores, places, width), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 9, 17, 64, 300])
@pytest.mark.parametrize("levels", [1, 3, 10**6], ids=["all tied", "three scores", "hardly a tie"])
def test_keeps_what_a_sort_puts_first(dtype: torch.dtype, width: int, levels: int) -> None:
    check((torch.rand(5, 1003) * levels).floor().to(dtype), width, 257)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("width", [1, 30])
def test_the_order_in_which_scores_come_does_not_matter(descending: bool, width: int) -> None:
    check(torch.rand(3, 700).sort(dim=1, descending=descending).values, width, 64)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    width=st.integers(1, 40),
    block=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_scores_in_any_blocks(data, rows, columns, width, block, dtype) -> None:
    flat = data.draw(
        st.lists(st.sampled_from([-2.0, -1e-30, 0.0, 0.5, 1e30, float("inf")]), min_size=rows * columns, max_size=280)
    )
    scores = torch.tensor(flat[: rows * columns], dtype=dtype).view(rows, columns)
    check(scores, width, block, torch.tensor(data.draw(st.permutations(range(columns)))))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    torch.set_num_threads(threads)
    check((torch.rand(700, 400) * 50).floor(), 20, 128)
