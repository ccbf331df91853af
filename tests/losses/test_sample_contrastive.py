import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses.sample_contrastive import SampleContrastiveKD
from tests.oracles import sample_contrastive as oracle
from tests.oracles.differences import central_differences


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def test_the_value_is_that_of_the_authors_code():
    value = SampleContrastiveKD()(3 * det(6, 5, 0.9, 0.4), 3 * det(6, 5, 0.2, 1.7))
    assert value.item() == pytest.approx(1.8028825278286948, abs=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 5), (7, 3), (5, 20)])
def test_the_loss_is_that_of_the_loops(n, k, temperature):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, k))
    ours = SampleContrastiveKD(temperature)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.sample_contrastive(student, teacher, temperature), rel=1e-10, abs=1e-14)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    SampleContrastiveKD()(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.sample_contrastive(s, teacher), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


def test_anchors_are_the_teachers_rows():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # both students look like the first sample
    assert float(SampleContrastiveKD()(student, teacher)) == pytest.approx(math.log(2))
    assert float(SampleContrastiveKD()(teacher, student)) != pytest.approx(math.log(2))


def test_logits_of_zeros_have_cosine_zero_and_pass_no_gradient():
    student = torch.zeros(3, 4, requires_grad=True)
    loss = SampleContrastiveKD()(student, torch.randn(3, 4))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert torch.equal(student.grad, torch.zeros(3, 4))
