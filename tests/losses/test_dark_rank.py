import pytest
import torch

from lightning_rkd.losses import HardDarkRank, SoftDarkRank


def test_the_soft_loss_of_a_moved_teacher_is_zero_and_the_hard_one_is_not():
    teacher = torch.randn(8, 3, dtype=torch.float64)
    assert abs(float(SoftDarkRank()(teacher + 5, teacher))) < 1e-9
    assert float(HardDarkRank()(teacher + 5, teacher)) > 0.01


def test_the_hard_loss_needs_the_teachers_order_only():
    teacher = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    confident = 10 * teacher  # the same order, far apart
    assert float(HardDarkRank()(confident, teacher)) < 1e-12
    assert float(HardDarkRank()(confident[[1, 0, 2, 3]], teacher)) > 100


@pytest.mark.parametrize("cls", [HardDarkRank, SoftDarkRank])
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_without_two_others_to_rank_is_an_exact_zero_with_a_graph(cls, n):
    student = torch.randn(n, 3, requires_grad=True)
    value = cls()(student, torch.randn(n, 5))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(n, 3))
