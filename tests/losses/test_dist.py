import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses.dist import DIST
from tests.oracles import dist as oracle
from tests.oracles.differences import central_differences


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DIST(intra_weight=0), 1.1095336949342),
        (DIST(inter_weight=0), 0.9892270493859574),
        (DIST(2, 3), 2 * 1.1095336949342 + 3 * 0.9892270493859574),
    ],
    ids=str,
)
def test_the_values_are_those_of_the_authors_code(loss, value):
    assert float(loss(3 * det(6, 5, 0.9, 0.4), 3 * det(6, 5, 0.2, 1.7))) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("settings", [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
@pytest.mark.parametrize(("n", "k"), [(2, 2), (2, 5), (7, 3), (5, 20)])
def test_the_loss_is_that_of_the_loops(n, k, settings):
    student, teacher = 3 * np.random.default_rng(n).normal(size=(2, n, k))
    ours = DIST(*settings)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.dist(student, teacher, *settings), rel=1e-9)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    DIST(2.0, 1.0, 2.0)(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.dist(s, teacher, 2.0, 1.0, 2.0), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


def test_every_pixel_of_dense_logits_is_a_sample():
    student, teacher = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 4).numpy() for x in (student, teacher)]
    assert float(DIST()(student, teacher)) == pytest.approx(oracle.dist(*rows), rel=1e-10)


def test_a_teacher_that_only_exaggerates_costs_next_to_nothing():
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    sharper = 2 * (probabilities - 1 / 3) + 1 / 3
    assert abs(float(DIST()(probabilities.log(), sharper.log()))) < 1e-5
    assert float(DIST()(probabilities.log(), sharper.flip(1).log())) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_uniform_predictions_correlate_with_nothing(network, dtype):
    student, teacher = torch.randn(2, 6, 10, dtype=dtype)
    (student if network == "student" else teacher).fill_(0.1)
    student.requires_grad_()
    loss = DIST()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2, abs=1e-5)
    assert student.grad.abs().max() < 1


def test_of_one_sample_only_the_row_counts():
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 5))
    value = DIST()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.item() == pytest.approx(oracle.dist(student, teacher, intra_weight=0) + 1, rel=1e-9)
