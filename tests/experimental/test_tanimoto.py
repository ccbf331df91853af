import pytest
import torch

from lightning_rkd.experimental import Tanimoto


@pytest.mark.parametrize("form", ["matrix", "sample"])
def test_a_copy_of_the_teacher_has_no_loss_and_a_longer_one_has(form):
    teacher = torch.randn(6, 4, dtype=torch.float64)
    teacher[2] = 0
    assert Tanimoto(form)(teacher, teacher) == 0
    lengths = torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    assert float(Tanimoto(form)(lengths * teacher, teacher)) > 1e-3


def test_the_form_sample_is_a_mean_of_per_sample_terms():
    loss, (student, teacher) = Tanimoto("sample"), torch.randn(2, 6, 4, dtype=torch.float64)
    halves = [loss(student[rows], teacher[rows]) for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(loss(student, teacher), sum(halves) / 2)
    assert not loss.gather
    assert Tanimoto().gather
