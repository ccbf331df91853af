import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import PKT
from lightning_rkd.losses.pkt import pkt
from tests.oracles import pkt as oracle

REDUCTION = pytest.mark.parametrize("reduction", ["official", "distinct"])


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def test_the_value_is_that_of_the_authors_code():
    value = PKT()(det(6, 4, 0.7, 1.1), det(6, 8, 1.3, 0.5))
    assert float(value) == pytest.approx(0.03384769277351432, rel=1e-12)


@REDUCTION
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 2), (3, 4), (8, 5)])
def test_the_loss_is_that_of_the_loops(n, d, reduction):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, d))
    teacher = teacher[:, :2]
    value = PKT(reduction)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(oracle.pkt(student, teacher, reduction), rel=1e-9, abs=1e-15)


@REDUCTION
@pytest.mark.parametrize("n", [2, 5])
def test_the_gradient_passes_gradcheck(reduction, n):
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: pkt(x, teacher, reduction=reduction), student.requires_grad_())


@REDUCTION
def test_zero_rows_are_unlike_all_and_pass_no_gradient(reduction):
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    student[[1, 4]] = 0
    teacher[2] = 0
    student.requires_grad_()
    value = pkt(student, teacher, reduction=reduction)
    value.backward()
    expected = oracle.pkt(student.detach().numpy(), teacher.numpy(), reduction)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(student.grad).all()
    assert not student.grad[[1, 4]].any()


@REDUCTION
@pytest.mark.parametrize("rows", [[[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
def test_a_sample_alone_or_opposite_to_all_others_gives_a_finite_gradient(reduction, rows):
    student, teacher = torch.tensor(rows, requires_grad=True), torch.randn(len(rows), 3)
    value = pkt(student, teacher, reduction=reduction)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    if len(rows) == 1:
        assert value == 0


@REDUCTION
def test_cosines_that_round_below_minus_one_give_finite_losses(reduction):
    row = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))
    student = torch.cat([factor * row for factor in (1, -1.37, -0.73, -3.3)]).requires_grad_()
    teacher = torch.randn(4, 5)
    values = [PKT(reduction)(student, teacher), PKT(reduction)(teacher.requires_grad_(), student)]
    torch.stack(values).sum().backward()
    assert all(torch.isfinite(value) for value in values)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


def test_lengths_do_not_matter_and_directions_do():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    lengths = 0.5 + torch.rand(6, 1, dtype=torch.float64)
    torch.testing.assert_close(PKT()(lengths * student, teacher), PKT()(student, teacher), rtol=1e-6, atol=0)
    assert float(PKT()(2 * teacher, teacher)) < 1e-12
    assert float(PKT()(student, teacher)) > 1e-4
