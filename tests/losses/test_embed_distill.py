import numpy as np
import pytest
import torch
from torch import nn

from lightning_rkd.losses.embed_distill import EmbedDistill, embedding_distance
from tests.oracles import embed_distill as oracle
from tests.oracles.differences import central_differences

BOTH = pytest.mark.parametrize("distance", ["l2", "cosine"])


@BOTH
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 4), (7, 3), (20, 5)])
def test_the_loss_is_that_of_the_loops(n, d, distance):
    student, teacher = np.random.default_rng(n).normal(size=(2, n, d))
    ours = EmbedDistill(distance=distance)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(oracle.embed_distill(student, teacher, distance), rel=1e-10, abs=1e-14)


@BOTH
def test_the_loss_with_a_projection_is_that_of_the_projected_student(distance):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    loss = EmbedDistill(3, 4, distance=distance).double()
    weight, bias = loss.project.weight.detach().numpy(), loss.project.bias.detach().numpy()
    ours = loss(torch.from_numpy(student), torch.from_numpy(teacher))
    expected = oracle.embed_distill(student @ weight.T + bias, teacher, distance)
    assert ours.item() == pytest.approx(expected, rel=1e-10)


@BOTH
def test_the_gradient_is_that_of_central_differences_of_the_loops(distance):
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    EmbedDistill(distance=distance)(x, torch.from_numpy(teacher)).backward()
    expected = central_differences(lambda s: oracle.embed_distill(s, teacher, distance), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


def test_distances_are_not_squared_so_every_sample_pulls_alike():
    student = torch.tensor([[1.0, 0.0], [100.0, 0.0]], requires_grad=True)
    EmbedDistill()(student, torch.zeros(2, 2)).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))


def test_a_sample_that_matches_exactly_passes_no_gradient():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    EmbedDistill()(student, torch.tensor([[1.0, 2.0], [0.0, 0.0]])).backward()
    assert torch.equal(student.grad[0], torch.zeros(2))
    assert torch.isfinite(student.grad).all()


def test_a_row_of_zeros_has_cosine_distance_one_and_passes_no_gradient():
    student = torch.zeros(2, 3, requires_grad=True)
    loss = EmbedDistill(distance="cosine")(student, torch.randn(2, 3))
    loss.backward()
    assert loss.item() == 1
    assert torch.equal(student.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("projection", "widths", "kind"),
    [
        (None, (4, 4), nn.Identity),
        (None, (3, 4), nn.Linear),
        (True, (4, 4), nn.Linear),
        (False, (4, 4), nn.Identity),
    ],
)
def test_there_is_a_projection_where_widths_differ_or_one_is_wanted(projection, widths, kind):
    loss = EmbedDistill(projection=projection)
    loss(torch.randn(2, widths[0]), torch.randn(2, widths[1]))
    assert isinstance(loss.project, kind)


def test_different_widths_without_a_projection_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"EmbedDistill: .* 3 wide, the teacher's 4; leave projection=False out"):
        EmbedDistill(projection=False)(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"EmbedDistill: .*\(2, 3\).*\(2, 4\).*projection"):
        embedding_distance(torch.randn(2, 3), torch.randn(2, 4))
