"""Losses that compare a student's rows with the teacher's own rows, so that the two share one space."""

import torch
from torch import Tensor, nn

from lightning_rkd.functional.scales import to_float64
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import RelationalLoss


class AnchoredLoss(RelationalLoss):
    """Base of losses on unit rows of student and teacher in one space, in float64.

    Where the widths differ, a linear layer without bias, trained with the student, brings the student's rows into the
    teacher's space. A subclass defines :meth:`compare`.
    """

    invariances = frozenset({"scale", "row scale"})
    aligns = True
    project: nn.Module

    def __init__(self, student_dim: int | None = None, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        different = student_dim != teacher_dim
        self.project = (
            nn.Linear(student_dim, teacher_dim, bias=False, dtype=torch.float32) if different else nn.Identity()
        )

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of unit rows (N, D), (N, D)."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = self.project(unit_rows(student)), teacher
        return self.compare(unit_rows(to_float64(s)), unit_rows(to_float64(t))).to(student.dtype)


def most_similar(similarities: Tensor, top_k: int) -> Tensor:
    """Columns of the largest entries of each row, largest first; ties go to the first column.

    Shapes: (N, M) -> (N, min(top_k, M)).
    """
    return similarities.argsort(dim=1, descending=True, stable=True)[:, :top_k]
