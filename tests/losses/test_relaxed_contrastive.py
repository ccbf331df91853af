import numpy as np
import pytest
import torch

from lightning_rkd.losses import RelaxedContrastive
from tests.oracles import relaxed_contrastive as oracle


@pytest.mark.parametrize(("sigma", "delta"), [(1.0, 1.0), (0.3, 1.5), (4.0, 0.5)])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_loss_is_that_of_the_loops(n, sigma, delta):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, 4))
    teacher = teacher[:, :3]
    value = RelaxedContrastive(sigma, delta)(torch.from_numpy(student), torch.from_numpy(teacher))
    expected = oracle.relaxed_contrastive(student, teacher, sigma, delta)
    assert float(value) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 3))
    x = torch.from_numpy(student).requires_grad_()
    (grad,) = torch.autograd.grad(RelaxedContrastive()(x, torch.from_numpy(teacher)), x)
    for i, k in np.ndindex(*student.shape):
        up, down = student.copy(), student.copy()
        up[i, k] += 1e-6
        down[i, k] -= 1e-6
        slope = (oracle.relaxed_contrastive(up, teacher) - oracle.relaxed_contrastive(down, teacher)) / 2e-6
        assert float(grad[i, k]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_only_the_teachers_directions_count():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    lengths = torch.rand(6, 1, dtype=torch.float64) + 0.1
    value = RelaxedContrastive()(student, teacher)
    torch.testing.assert_close(RelaxedContrastive()(student, teacher * lengths), value)
    torch.testing.assert_close(RelaxedContrastive()(3 * student + 7, teacher), value)
    assert not torch.allclose(RelaxedContrastive()(student * lengths, teacher), value)


@pytest.mark.parametrize("case", ["duplicates", "collapsed", "zero teacher"])
def test_duplicates_count_as_all_pairs_do_and_pass_finite_gradients(case):
    student, teacher = torch.randn(6, 4), torch.randn(6, 3)
    if case == "zero teacher":
        teacher[1:3] = 0
    else:
        student[1 : 3 if case == "duplicates" else 6] = student[0].clone()
    expected = oracle.relaxed_contrastive(student.double().numpy(), teacher.double().numpy())
    student.requires_grad_()
    value = RelaxedContrastive()(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 10


def test_pairs_the_teacher_finds_alike_are_pulled_and_others_pushed():
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    good = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=torch.float64)
    assert float(RelaxedContrastive()(good, teacher)) < 0.2
    assert float(RelaxedContrastive()(good[[0, 2, 1, 3]], teacher)) > 1
