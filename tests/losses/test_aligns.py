"""Losses that bring the student's embedding into the teacher's space, and those that do not."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from lightning_rkd import losses
from lightning_rkd.experimental import Tanimoto
from lightning_rkd.losses import RelationalLoss
from lightning_rkd.losses.weighting import LossSum


def exported() -> dict[str, type[RelationalLoss]]:
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, RelationalLoss)}


ALIGNING = {
    **{name: cls for name, cls in exported().items() if cls.aligns},
    "Regression, smooth_l1": lambda: losses.Regression("smooth_l1"),
    "Tanimoto, sample": lambda: Tanimoto("sample"),
}


def found_in_teachers_gallery(loss: RelationalLoss) -> float:
    """Share of rows, free to move, whose nearest row of the teacher is their own after training with a loss."""
    torch.manual_seed(0)
    teacher = torch.randn(24, 32) * torch.logspace(0.5, -1, 32) + torch.linspace(-1, 1.5, 32)
    student = (torch.randn(24, 32) + 3).requires_grad_()  # all entries far from 0, as behind a ReLU
    loss.materialize(student, teacher, like=student)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    rows = loss.project(student.detach()) if hasattr(loss, "project") else student.detach()
    near = F.normalize(rows) @ F.normalize(teacher).T
    return (near.argmax(1) == torch.arange(24)).float().mean().item()


def test_the_losses_that_align_are_these():
    assert set(ALIGNING) == {
        "AnchoredRKD",
        "CSD",
        "D3",
        "EmbedDistill",
        "RAML",
        "ROP",
        "Regression",
        "Regression, smooth_l1",
        "Tanimoto, sample",
        "VkD",
    }


@pytest.mark.parametrize("make", ALIGNING.values(), ids=ALIGNING)
def test_a_student_of_a_loss_that_aligns_finds_its_rows_of_the_teacher(make):
    assert make().aligns
    assert found_in_teachers_gallery(make()) > 0.9


@pytest.mark.parametrize(
    "make", [losses.RKDDistance, losses.PKT, losses.SRD, losses.EGA, Tanimoto], ids=lambda c: c.__name__
)
def test_a_student_of_another_loss_does_not(make):
    assert not make().aligns
    assert found_in_teachers_gallery(make()) < 0.5


def test_a_sum_aligns_if_one_of_its_terms_does():
    assert (losses.RKD() + 2 * losses.CSD()).aligns
    assert LossSum({"angles": losses.RKDAngle(), "rows": Tanimoto("sample")}).aligns
    assert not (losses.RKD() + losses.PKT()).aligns
