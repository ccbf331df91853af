"""Regression of the teacher's embedding: the baseline of losses that align the student's space with the teacher's."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss
from lightning_rkd.losses.parts.checks import check_choice

Distance = Literal["cosine", "smooth_l1"]


class Regression(AnchoredLoss):
    r"""Predicts the teacher's embedding of each sample from the student's.

    .. math::
        L_\text{cosine} = \frac{1}{N} \sum_i 1 - \langle \hat s_i, \hat t_i \rangle, \qquad
        L_\text{smooth L1} = \frac{1}{N D_t} \sum_{i,d} h(s_{id} - t_{id}), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    The cosine compares directions, which retrieval by cosine uses; smooth L1 compares the embeddings as they are.
    Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar.

    Args:
        distance: ``"cosine"`` or ``"smooth_l1"``.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Budnik and Avrithis 2021, Asymmetric metric learning for knowledge transfer, arXiv:2006.16331, which compares
        with this baseline.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.eye(2)
        >>> Regression()(student, teacher), Regression("smooth_l1")(student, teacher)
        (tensor(0.1000), tensor(1.2500))
    """

    gather = False
    reference = Reference("budnik2021asymmetric", "from memory", source="the formula is common knowledge")

    def __init__(self, distance: Distance = "cosine", **sizes: int | None) -> None:
        super().__init__(**sizes)
        check_choice("Regression", Distance, distance=distance)
        self.distance = distance
        if distance == "smooth_l1":
            self.invariances = frozenset()

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (1 - (student * teacher).sum(1)).mean()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distance == "cosine":
            return super().forward(student, teacher)
        return F.smooth_l1_loss(self.project(student), teacher)
