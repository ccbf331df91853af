import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import HardDarkRank, SoftDarkRank
from tests.oracles import dark_rank as oracle

BOTH = pytest.mark.parametrize(("cls", "loops"), [(HardDarkRank, oracle.hard), (SoftDarkRank, oracle.soft)])
EITHER = pytest.mark.parametrize("cls", [HardDarkRank, SoftDarkRank])


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def test_the_value_is_that_of_the_code_of_park_et_al():
    value = HardDarkRank()(det(6, 4, 0.7, 1.1), det(6, 8, 1.3, 0.5))
    assert float(value) == pytest.approx(71.57415386419008, rel=1e-12)


@BOTH
@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("settings", [(3.0, 3.0, 4), (0.5, 1.0, 3), (12.25, 4.0, 2)], ids=str)
def test_the_loss_is_that_of_the_loops(cls, loops, n, settings):
    student, teacher = 0.5 * np.random.default_rng(n).normal(size=(2, n, 4))
    teacher = teacher[:, :3]
    value = cls(*settings)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(loops(student, teacher, *settings), rel=1e-9, abs=1e-14)


@EITHER
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_the_gradient_passes_gradcheck(cls, beta):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cls(beta=beta, length=3)(x, teacher), student.requires_grad_())


def test_the_soft_loss_of_a_moved_teacher_is_zero_and_the_hard_one_is_not():
    teacher = torch.randn(8, 3, dtype=torch.float64)
    assert abs(float(SoftDarkRank()(teacher + 5, teacher))) < 1e-9
    assert float(HardDarkRank()(teacher + 5, teacher)) > 0.01


def test_the_hard_loss_asks_for_the_teachers_order_only():
    teacher = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    confident = 10 * teacher  # the same order, far apart
    assert float(HardDarkRank()(confident, teacher)) < 1e-12
    assert float(HardDarkRank()(confident[[1, 0, 2, 3]], teacher)) > 100


@EITHER
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_without_two_others_to_rank_is_an_exact_zero_with_a_graph(cls, n):
    student = torch.randn(n, 3, requires_grad=True)
    value = cls()(student, torch.randn(n, 5))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(n, 3))


@EITHER
@pytest.mark.parametrize("beta", [1.0, 1.5, 3.0])
def test_duplicates_give_finite_gradients_and_are_never_in_their_own_list(cls, beta):
    student, teacher = torch.randn(7, 3), torch.randn(7, 4)
    student[3] = student[1]
    teacher[[0, 4, 5]] = teacher[2].clone()
    loops = oracle.hard if cls is HardDarkRank else oracle.soft
    expected = loops(student.double().numpy(), teacher.double().numpy(), beta=beta)
    student.requires_grad_()
    value = cls(beta=beta)(student, teacher)
    value.backward()
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(student.grad).all()


@EITHER
def test_far_embeddings_do_not_overflow(cls):
    student = (1e3 * torch.randn(6, 4)).requires_grad_()
    value = cls()(student, 1e3 * torch.randn(6, 4))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_lists_too_long_to_score_all_orders_are_refused():
    assert HardDarkRank(length=20).length == 20
    with pytest.raises(ValueError, match=r"SoftDarkRank: length must be at most 7, .* got 8; HardDarkRank"):
        SoftDarkRank(length=8)
