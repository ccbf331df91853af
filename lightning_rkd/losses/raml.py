"""Distillation by absolute and relational terms (Suma and Tolias 2023), for queries at a small resolution."""

import torch
from torch import Tensor

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss

_EPS = 1e-6


class RAML(AnchoredLoss):
    r"""Matches the teacher's rows, and its similarities between samples by two kinds of the student's.

    .. math::
        L = \frac{1}{N} \sum_i \big(1 - \langle \hat s_i, \hat t_i \rangle + \epsilon\big)^2
        + \sum_{i \ne j} \frac{\lambda_1 \big(\langle \hat s_i, \hat t_j \rangle - T_{ij} + \epsilon\big)^2
        + \lambda_2 \big(\langle \hat s_i, \hat s_j \rangle - T_{ij} + \epsilon\big)^2}{N (N - 1)}, \qquad
        T_{ij} = \langle \hat t_i, \hat t_j \rangle

    with :math:`\epsilon = 10^{-6}`. The first two terms compare with the teacher's own rows, the third compares
    relations alone.

    Departure: the code that this follows passes :math:`\lambda_1` for :math:`\lambda_2` as well, which contradicts its
    own configuration.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of one row has the first term only.

    Args:
        lambda1: Weight of similarities between student and teacher.
        lambda2: Weight of similarities within the student.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Suma and Tolias 2023, Large-to-Small Image Resolution Asymmetry in Deep Metric Learning, arXiv:2210.05463.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
        >>> RAML()(student, teacher)
        tensor(0.5688)
    """

    reference = Reference(
        "suma2023large",
        "read in code",
        source="SCY-X/D3still, AIR_Distiller/distillers/RAML.py, by other authors",
        weight=1.0,
        weight_note="metric learning with cross-entropy and a triplet loss, the same code",
        result="R@1 on CUB, student queries and the teacher's gallery, ResNet101 to ResNet18: 62.89, D3still",
    )

    def __init__(self, lambda1: float = 0.7482, lambda2: float = 0.6778, **sizes: int | None) -> None:
        super().__init__(**sizes)
        self.lambda1, self.lambda2 = lambda1, lambda2

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        own, others = teacher @ teacher.T, 1 - torch.eye(n, dtype=student.dtype, device=student.device)

        def gap(similarities: Tensor) -> Tensor:
            return ((similarities - own + _EPS).square() * others).sum() / max(1, n * (n - 1))

        absolute = (1 - (student * teacher).sum(1) + _EPS).square().mean()
        return absolute + self.lambda1 * gap(student @ teacher.T) + self.lambda2 * gap(student @ student.T)
