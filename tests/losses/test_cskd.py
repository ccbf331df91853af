import numpy as np
import pytest
import torch

from lightning_rkd.losses.cskd import CosineTemperatureKD, class_similarity, cosine_temperatures
from tests.oracles import cskd as oracle
from tests.oracles.differences import central_differences


def test_the_gradient_takes_the_temperatures_for_constants():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    CosineTemperatureKD()(x, torch.from_numpy(teacher)).backward()
    fixed = oracle.temperatures(student, teacher)
    expected = central_differences(lambda s: oracle.cosine_temperature(s, teacher, fixed=fixed), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-8)


def test_samples_on_which_the_networks_agree_are_cold_and_the_others_hot():
    student, teacher = torch.randn(2, 8, 5, dtype=torch.float64)
    temperatures = cosine_temperatures(student, teacher)
    assert temperatures.shape == (8, 1)
    assert float(temperatures.min()) == 2
    assert float(temperatures.max()) == pytest.approx(6)
    np.testing.assert_allclose(temperatures.flatten(), oracle.temperatures(student.numpy(), teacher.numpy()))


def test_where_all_samples_agree_alike_all_are_cold():
    logits = torch.randn(1, 5).expand(4, 5)
    assert torch.equal(cosine_temperatures(logits, logits), torch.full((4, 1), 2.0))
    assert torch.equal(cosine_temperatures(logits[:1], torch.randn(1, 5)), torch.full((1, 1), 2.0))


def test_a_class_whose_probabilities_underflow_keeps_its_direction():
    student, teacher = torch.randn(2, 6, 4)
    student[:, 0] -= 120  # below the smallest number of float32, at temperature 1
    expected = class_similarity(student.double(), teacher.double(), temperature=1.0)
    torch.testing.assert_close(class_similarity(student, teacher, temperature=1.0).double(), expected)
