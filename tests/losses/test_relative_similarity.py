"""The order of all similarities of a batch: the published sum, its ties, and its memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses import RelativeSimilarity
from tests.harness.forks import measure_growth, needs_proc


def in_full(student: Tensor, teacher: Tensor, margin: float = 0.015) -> Tensor:
    """The equation with its M x M differences."""

    def differences(x: Tensor) -> Tensor:
        unit = F.normalize(x)
        scores = (unit @ unit.T)[tuple(torch.triu_indices(len(x), len(x), 1))]
        return (scores - scores[:, None])[tuple(torch.triu_indices(len(scores), len(scores), 1))]

    signs = torch.where(differences(teacher) < 0, 1, -1)
    return F.relu(differences(student) * signs + margin).mean()


@pytest.mark.parametrize("near", [0.0, 0.3, 0.99])
def test_value_and_gradient_are_those_of_all_pairs_of_pairs_to_1e12(near):
    torch.manual_seed(0)
    student, teacher = torch.randn(24, 8, dtype=torch.float64), torch.randn(24, 16, dtype=torch.float64)
    student[:, :8] = (1 - near) * student + near * teacher[:, :8]
    student.requires_grad_()
    ours, expected = RelativeSimilarity()(student, teacher), in_full(student, teacher)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    grads = (torch.autograd.grad(x, student)[0] for x in (ours, expected))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_of_equal_similarities_the_later_pair_is_to_be_the_greater():
    teacher = torch.eye(3)  # all pairs have the similarity 0: (0, 1), then (0, 2), then (1, 2)
    rising = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # 0, 0.71, 0.71
    assert RelativeSimilarity(0.0)(rising, teacher).item() == 0
    # in the reverse order 0.71, 0.71, 0, so that two of the three pairs are wrong
    assert RelativeSimilarity(0.0)(rising.flip(0), teacher).item() == pytest.approx(2 * 0.5**0.5 / 3)


_STEP = """
from lightning_rkd.losses import RelativeSimilarity

def step(n):
    student = torch.randn(n, 256, requires_grad=True)
    RelativeSimilarity()(student, torch.randn(n, 512)).backward()
"""


@pytest.mark.slow
@needs_proc
def test_a_thousand_rows_add_less_than_200_mebibytes():
    assert 8 < measure_growth(_STEP, 16, 1024) < 200  # in full 524,000 squared numbers would take a tebibyte
