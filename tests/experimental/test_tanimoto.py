import numpy as np
import pytest
import torch

from lightning_rkd.experimental import Tanimoto
from tests.oracles import tanimoto as oracle

FORM = pytest.mark.parametrize("form", ["matrix", "sample"])


@FORM
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (3, 4), (8, 5)])
def test_the_loss_is_that_of_the_loops(form, n, d):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, d))
    student[-1] = 0
    value = Tanimoto(form)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(getattr(oracle, form)(student, teacher), rel=1e-12, abs=1e-15)


def test_the_matrices_of_networks_of_different_widths_compare():
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 6))
    teacher = teacher[:, :2]
    value = Tanimoto()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(oracle.matrix(student, teacher), rel=1e-12)


@FORM
def test_a_copy_of_the_teacher_has_no_loss_and_a_longer_one_has(form):
    teacher = torch.randn(6, 4, dtype=torch.float64)
    teacher[2] = 0
    assert Tanimoto(form)(teacher, teacher) == 0
    lengths = torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    assert float(Tanimoto(form)(lengths * teacher, teacher)) > 1e-3


@FORM
def test_zero_rows_on_both_sides_give_finite_gradients(form):
    student, teacher = torch.randn(2, 6, 4)
    student[1:3] = 0
    teacher[2:4] = 0
    student.requires_grad_()
    value = Tanimoto(form)(student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_the_form_sample_is_a_mean_of_per_sample_terms():
    loss, (student, teacher) = Tanimoto("sample"), torch.randn(2, 6, 4, dtype=torch.float64)
    halves = [loss(student[rows], teacher[rows]) for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(loss(student, teacher), sum(halves) / 2)
    assert not loss.gather
    assert Tanimoto().gather


def test_different_widths_are_refused_in_the_form_sample_with_the_cure():
    with pytest.raises(ValueError, match=r"Tanimoto: form='sample' .* got 4 .* and 7 .*form='matrix'"):
        Tanimoto("sample")(torch.randn(3, 4), torch.randn(3, 7))
