import numpy as np
import pytest
import torch

from lightning_rkd.losses.dist import DIST
from tests.oracles import dist as oracle


def test_a_teacher_that_only_exaggerates_costs_next_to_nothing():
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    sharper = 2 * (probabilities - 1 / 3) + 1 / 3
    assert abs(float(DIST()(probabilities.log(), sharper.log()))) < 1e-5
    assert float(DIST()(probabilities.log(), sharper.flip(1).log())) > 0.1


def test_of_one_sample_only_the_row_counts():
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 5))
    value = DIST()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.item() == pytest.approx(oracle.dist(student, teacher, intra_weight=0) + 1, rel=1e-9)
