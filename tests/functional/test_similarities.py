import pytest
import torch
from torch.nn import functional as F

from lightning_rkd.functional.similarities import (
    cosine_similarities,
    tanimoto_coefficients,
    tanimoto_of_pairs,
    unit_rows,
)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_epsilon_is_added_to_the_norm_of_rows_of_any_scale(scale):
    x = torch.randn(4, 3) * scale
    norms = x.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit_rows(x, eps=scale).double(), x.double() / (norms + scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_rows_of_any_length_have_their_direction_and_finite_gradients(scale):
    x = torch.randn(5, 3)
    x[1:3] *= scale
    x.requires_grad_()
    unit = unit_rows(x)
    (unit * torch.randn(5, 3)).sum().backward()
    assert torch.isfinite(unit).all()
    assert torch.isfinite(x.grad).all()
    if scale >= 1e-30:
        torch.testing.assert_close(unit, F.normalize(x.detach().double(), dim=1, eps=1e-300).float())
    else:  # a gradient could not follow
        assert not unit[1:3].any()
        assert not x.grad[1:3].any()


def test_cosines_are_those_of_pytorch_and_zero_for_zero_rows():
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(cosine_similarities(x), F.cosine_similarity(x[:, None], x[None], dim=2))
    x[2] = 0
    assert not cosine_similarities(x)[2].any()


def test_tanimoto_coefficients_lie_between_minus_a_third_and_one():
    x = torch.randn(50, 2, dtype=torch.float64)
    t = tanimoto_coefficients(torch.cat([x, -x]))
    assert torch.equal(t.diagonal(), torch.ones(100, dtype=torch.float64))
    assert float(t.min()) == pytest.approx(-1 / 3)
    assert float(t.max()) == 1


def test_the_matrix_holds_the_coefficients_of_pairs():
    x = torch.randn(5, 3, dtype=torch.float64)
    x[3] = 0
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    torch.testing.assert_close(tanimoto_coefficients(x).flatten(), tanimoto_of_pairs(x[i], x[j]))


def test_two_zero_rows_are_equal_and_pass_no_gradient():
    x = torch.zeros(3, 2)
    x[0] = 1
    x.requires_grad_()
    t = tanimoto_coefficients(x)
    t.sum().backward()
    assert t.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert torch.isfinite(x.grad).all()
