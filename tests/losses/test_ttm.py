import pytest
import torch

from lightning_rkd.losses.soft_target import SoftTarget
from lightning_rkd.losses.ttm import TTM, WTTM


@pytest.mark.parametrize("cls", [TTM, WTTM])
def test_exponent_one_is_hintons_loss_at_temperature_one(cls):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(cls(1.0)(student, teacher), SoftTarget(1.0)(student, teacher))


def test_a_one_hot_teacher_weighs_one_and_a_uniform_one_a_power():
    student = torch.randn(1, 5, dtype=torch.float64)
    for teacher, weight in ((torch.tensor([[1e3, 0, 0, 0, 0]]), 1), (torch.zeros(1, 5), 5**0.75)):
        ratio = WTTM(0.25)(student, teacher) / TTM(0.25)(student, teacher)
        assert float(ratio) == pytest.approx(weight, rel=1e-10)
