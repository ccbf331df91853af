"""Discriminative and consistent distillation (Giakoumoglou and Stathaki 2024): contrast in a batch, both ways alike."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive
from lightning_rkd.losses.parts.projector import Projector


class DCD(RelationalLoss):
    r"""Finds the teacher's row of each sample in the batch, with the same probabilities from either network.

    .. math::
        L = -\frac{1}{N} \sum_i \log p_{ii} + \frac{\alpha}{N} \sum_i \mathrm{KL}(q_i \,\Vert\, p_i), \qquad
        p_{ij} = \frac{e^{z_{ij}}}{\sum_m e^{z_{im}}}, \quad q_{ij} = \frac{e^{z_{ji}}}{\sum_m e^{z_{mi}}}, \quad
        z_{ij} = \min(e^\tau, c)\, \langle \hat s_i, \hat t_j \rangle

    with :math:`\hat s, \hat t` the rows after a linear layer of each network to d dimensions, at unit norm. Both layers
    and :math:`\tau`, the logarithm of a scale, are trained with the student.

    Departure: the authors add a learnt bias to all z, on which no probability depends and which receives no gradient;
    it is left out.

    Shapes: student (N, D_s), teacher (N, D_t) -> scalar. One row gives 0.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        dim: d.
        alpha: :math:`\alpha`, weight of the divergence.
        max_scale: c. A scale that has reached it receives no gradient.

    Reference:
        Giakoumoglou and Stathaki 2024, Discriminative and Consistent Representation Distillation, arXiv:2407.11802.

    Example:
        >>> loss = DCD(student_dim=4, teacher_dim=8)
        >>> loss(torch.randn(6, 4), torch.randn(6, 8)).shape, loss.log_scale
        (torch.Size([]), Parameter containing:
        tensor(1., requires_grad=True))
    """

    reference = Reference(
        "giakoumoglou2024discriminative",
        "read in code",
        source="giakoumoglou/distillers, cifar/distillers/DCD.py and cifar/README.md",
        weight=1.0,
        weight_note="CIFAR-100, the authors' README",
    )
    student_projector: Projector
    teacher_projector: Projector

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        dim: int = 128,
        alpha: float = 0.5,
        max_scale: float = 10.0,
    ) -> None:
        super().__init__()
        check_at_least("DCD", 1, dim=dim)
        check_at_least("DCD", 0, alpha=alpha)
        check_positive("DCD", max_scale=max_scale)
        self.dim, self.alpha, self.max_scale = dim, alpha, max_scale
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.student_projector = Projector(student_dim, self.dim)
        self.teacher_projector = Projector(teacher_dim, self.dim)
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float32))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(self.max_scale)).exp()
        scores = scale * self.student_projector(student) @ self.teacher_projector(teacher).T
        log_p, log_q = F.log_softmax(scores, dim=1), F.log_softmax(scores.T, dim=1)
        consistency = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return self.alpha * consistency - log_p.diagonal().mean()
