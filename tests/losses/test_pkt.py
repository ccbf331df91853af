import pytest
import torch

from lightning_rkd.losses import PKT
from lightning_rkd.losses.pkt import pkt

REDUCTION = pytest.mark.parametrize("reduction", ["official", "distinct"])


@REDUCTION
def test_zero_rows_pass_no_gradient(reduction):
    student = torch.cat([torch.randn(4, 4), torch.zeros(2, 4)]).requires_grad_()
    PKT(reduction)(student, torch.randn(6, 3)).backward()
    assert not student.grad[4:].any()
    assert student.grad[:4].any()


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
