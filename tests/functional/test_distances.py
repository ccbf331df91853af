import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rkd.functional import distances as module
from lightning_rkd.functional._kernels import native
from lightning_rkd.functional.distances import pairwise_distances, squared_distances


def by_differences(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x[:, None] - x[None]).square().sum(2)


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_float32_rows_far_from_the_origin_have_exact_distances(n, d, offset, scale, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset
    expected = by_differences(x)
    torch.testing.assert_close(squared_distances(x), expected, rtol=1e-9, atol=1e-12 * float(expected.max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_float64_symmetric_and_zero_on_the_diagonal(dtype):
    s = squared_distances(torch.randn(7, 5).to(dtype))
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, s.T, rtol=1e-12, atol=0)
    assert (s.diagonal() == 0).all()
    assert (s[~torch.eye(7, dtype=torch.bool)] > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_duplicates_have_distance_zero_and_close_rows_have_not(offset):
    x = torch.randn(8, 300, dtype=torch.float64) + offset
    x[3] = x[5]
    x[1] = x[0] + 1e-6 * torch.randn(300)
    s = squared_distances(x)
    assert s[3, 5] == s[5, 3] == 0
    assert s[0, 1] == pytest.approx(float((x[0] - x[1]).square().sum()), rel=1e-2)


def test_the_gradient_is_that_of_the_differences():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_distances, x)
    weight = torch.randn(6, 6, dtype=torch.float64)  # not symmetric
    (ours,) = torch.autograd.grad((squared_distances(x) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((by_differences(x) * weight).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_blocks_of_differences_agree_with_the_gram_form(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 50)  # several blocks, the last one short
    x = torch.randn(11, 5, dtype=torch.float64) + 100
    x[2] = x[7]
    torch.testing.assert_close(module._by_differences(x), squared_distances(x))
    assert module._by_differences(x.float()).dtype == torch.float32
    assert module._by_differences(x)[2, 7] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (7, 5), (33, 40), (203, 11)])
def test_the_kernel_and_pytorch_give_the_same(monkeypatch, n, d, dtype):
    x = (torch.randn(n, d) + 3).to(dtype)
    x[n // 2] = x[0]
    pull = torch.randn(n, n, dtype=torch.float64)
    pytest.importorskip("numba")
    assert native("distance_cpu")
    results = []
    for found in (native, lambda name: None):
        monkeypatch.setattr(module, "native", found)
        mine = x.clone().requires_grad_()
        squared = squared_distances(mine)
        (grad,) = torch.autograd.grad(squared, mine, pull)
        results.append((squared.detach(), grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-15)
    assert torch.equal(results[0][0] == 0, results[1][0] == 0)
    assert results[0][1].dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)


def test_a_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="squared_distances has a first derivative only"):
        torch.autograd.grad(squared_distances(x).sum(), x, create_graph=True)


def test_distances_are_roots_and_zero_ones_pass_no_gradient():
    x = torch.randn(6, 4, dtype=torch.float64)
    x[1] = x[4]
    x.requires_grad_()
    d = pairwise_distances(x)
    torch.testing.assert_close(d.square(), squared_distances(x))
    (grad,) = torch.autograd.grad(d[1, 4] + d[2, 2], x)
    assert torch.equal(grad, torch.zeros_like(grad))
    (grad,) = torch.autograd.grad(pairwise_distances(x).sum(), x)
    assert torch.isfinite(grad).all()
