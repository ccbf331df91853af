import numpy as np
import pytest
import torch

from lightning_rkd.losses.cskd import ClassSimilarityKD, CosineTemperatureKD, class_similarity, cosine_temperatures
from tests.oracles import cskd as oracle
from tests.oracles.differences import central_differences

SIZES = pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 2), (2, 5), (7, 3), (5, 20)])


@SIZES
@pytest.mark.parametrize("settings", [(4.0, 2.0), (1.0, 0.5)])
def test_class_similarity_is_that_of_the_loops(n, k, settings):
    student, teacher = 3 * np.random.default_rng(n).normal(size=(2, n, k))
    ours = ClassSimilarityKD(*settings)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.class_similarity(student, teacher, *settings), rel=1e-9, abs=1e-12)


@SIZES
@pytest.mark.parametrize("settings", [(2.0, 6.0, 2.0), (1.0, 1.0, 1.0), (1.0, 3.0, 0.5)])
def test_cosine_temperatures_give_the_loss_of_the_loops(n, k, settings):
    student, teacher = 3 * np.random.default_rng(n).normal(size=(2, n, k))
    ours = CosineTemperatureKD(*settings)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.cosine_temperature(student, teacher, *settings), rel=1e-9, abs=1e-12)


def test_the_gradient_of_class_similarity_is_that_of_the_loops():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    ClassSimilarityKD()(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.class_similarity(s, teacher), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-8)


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


@pytest.mark.parametrize("loss", [ClassSimilarityKD(), CosineTemperatureKD()], ids=str)
def test_the_same_logits_have_loss_zero(loss):
    logits = torch.randn(4, 5, dtype=torch.float64)
    assert abs(loss(logits, logits).item()) < 1e-12


def test_a_low_temperature_above_the_high_one_is_refused():
    with pytest.raises(ValueError, match="low must not exceed high, got low=6 and high=2"):
        CosineTemperatureKD(6, 2)


def test_a_class_whose_probabilities_underflow_keeps_its_direction():
    student, teacher = torch.randn(2, 6, 4)
    student[:, 0] -= 120  # below the smallest number of float32, at temperature 1
    expected = class_similarity(student.double(), teacher.double(), temperature=1.0)
    torch.testing.assert_close(class_similarity(student, teacher, temperature=1.0).double(), expected)
