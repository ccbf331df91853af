"""EmbedDistill (Kim et al. 2023): distances between the student's embeddings and the teacher's."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rkd.functional.similarities import row_norms, unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_choice

Distance = Literal["l2", "cosine"]


class EmbedDistill(RelationalLoss):
    r"""Embedding matching: the mean distance between the student's embeddings, projected, and the teacher's.

    .. math:: L = \frac{1}{N} \sum_i \lVert P s_i - t_i \rVert_2

    The distance is not squared, so that a few samples that a small student cannot match do not dominate the gradient;
    a sample that matches exactly passes none. P is linear, trained with the student, and left out where the widths are
    equal.

    This is the embedding-matching part of the method, for one tower; for queries and documents it is used on both.
    Score distillation, generated queries and the inherited document tower of the paper are not part of this loss.

    Departures: ``distance="cosine"``, one minus the cosine, is not the paper's; the sentence-transformers library
    takes it by default. A row of zeros then has distance 1 and passes no gradient.

    Shapes: (N, D_s), (N, D_t) -> scalar.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        distance: ``"l2"`` as in the paper, or ``"cosine"``.
        projection: Whether to use P; with ``None``, where the widths differ.

    Reference:
        Kim et al. 2023, EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval, arXiv:2301.12005.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> EmbedDistill()(student, teacher)
        tensor(3.)
    """

    gather = False
    aligns = True
    reference = Reference(
        "kim2023embeddistill",
        "read in code",
        source="sentence-transformers, EmbedDistillLoss, which cites the paper's equations 7 and 8",
        result="MSMARCO: students of a tenth of the size keep 95 to 97 % of the teacher, with the whole method",
    )
    project: nn.Module

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        distance: Distance = "l2",
        projection: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("EmbedDistill", Distance, distance=distance)
        self.distance, self.projection = distance, projection
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        if self.projection is False and student_dim != teacher_dim:
            raise ValueError(
                f"EmbedDistill: the student's embeddings are {student_dim} wide, the teacher's {teacher_dim}; "
                "leave projection=False out, or give the student a head of the teacher's width"
            )
        wanted = student_dim != teacher_dim if self.projection is None else self.projection
        self.project = nn.Linear(student_dim, teacher_dim, dtype=torch.float32) if wanted else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        projected = self.project(student)
        if self.distance == "cosine":
            return (1 - (unit_rows(projected) * unit_rows(teacher)).sum(1)).mean()
        return row_norms(projected - teacher).mean()
