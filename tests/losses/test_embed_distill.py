import pytest
import torch
from torch import nn

from lightning_rkd.losses.embed_distill import EmbedDistill


def test_distances_are_not_squared_so_every_sample_pulls_alike():
    student = torch.tensor([[1.0, 0.0], [100.0, 0.0]], requires_grad=True)
    EmbedDistill()(student, torch.zeros(2, 2)).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))


def test_a_sample_that_matches_exactly_passes_no_gradient():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    EmbedDistill()(student, torch.tensor([[1.0, 2.0], [0.0, 0.0]])).backward()
    assert torch.equal(student.grad[0], torch.zeros(2))
    assert torch.isfinite(student.grad).all()


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
