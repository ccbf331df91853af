"""Information theoretic distillation (Miles, Lopez-Rodriguez and Mikolajczyk 2022): correlation, mutual information."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.functional.scales import centre_columns, smallest_norm
from lightning_rkd.functional.similarities import cosine_similarities
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_positive


def correlation_loss(student: Tensor, teacher: Tensor, *, alpha: float = 1.5) -> Tensor:
    r"""The correlation term of :class:`ITRD`, for embeddings of equal width.

    .. math:: L_{corr} = \log_2 \sum_d |c_d - 1|^{2 \alpha}, \qquad
        c_d = \frac{1}{N} \sum_n \frac{s_{nd} - \bar s_d}{\sigma(s_d)} \frac{t_{nd} - \bar t_d}{\sigma(t_d)}

    The standard deviations are unbiased (divided by N - 1) and the mean is not, as in the authors' code, so that a
    match gives :math:`c_d = (N - 1) / N`, and never the logarithm of 0. A column that is constant correlates with
    nothing, c = 0, and passes no gradient.

    Shapes: (N, D), (N, D) -> scalar. One row gives 0.
    """
    if len(student) < 2:
        return student.sum() * 0
    c = (_standardised(student) * _standardised(teacher.detach())).mean(0)
    return (c - 1).square().pow(alpha).sum().log2().to(student.dtype)


def mutual_information_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The mutual information term of :class:`ITRD`.

    .. math:: L_{mi} = \lVert \bar G_s \rVert_F^2 - \lVert \bar G_{st} \rVert_F^2, \qquad
        \bar G = G / \mathrm{tr}\, G, \quad G_{st} = G_s \circ G_t

    with the cosines between the samples of a batch as G. Where all rows are 0, so is the matrix.
    """
    s, t = cosine_similarities(student), cosine_similarities(teacher.detach())
    return _over_trace(s).square().sum() - _over_trace(s * t).square().sum()


def _standardised(x: Tensor) -> Tensor:
    rows = centre_columns(x)
    variance = rows.square().sum(0) / (len(x) - 1)
    constant = variance <= smallest_norm(x.dtype) ** 2
    return torch.where(constant, 0, rows / torch.where(constant, 1, variance).sqrt())


def _over_trace(g: Tensor) -> Tensor:
    trace = g.diagonal().sum()  # on a GPU the backward pass of trace() waits for the device
    return g / torch.where(trace > 0, trace, 1)


class ITRD(RelationalLoss):
    r"""Correlates the student's columns with the teacher's, and transfers the information of the batch's Gram matrix.

    .. math:: L = \lambda_{corr} L_{corr}(W s + b, t) + \lambda_{mi} L_{mi}

    with :math:`L_{corr}` of :func:`correlation_loss` and :math:`L_{mi}` of :func:`mutual_information_loss`, and one
    learnt linear map to the teacher's width. As in the authors' code the second term compares the mapped student where
    the widths differ, and the student itself where they are equal.

    Departures: constant columns and zero rows pass no gradient, where theirs give NaN or divide by 1e-12.

    Shapes: student (N, D_s), teacher (N, D_t) -> scalar. The value has no lower bound at 0. One row gives 0.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        correlation_weight: :math:`\lambda_{corr}`.
        mutual_weight: :math:`\lambda_{mi}`; the authors' example for WRN-40-2 to WRN-16-2 has 1, with alpha 1.01.
        alpha: Order of the entropy in :math:`L_{corr}`.

    Reference:
        Miles, Lopez-Rodriguez and Mikolajczyk 2022, Information Theoretic Representation Distillation,
        arXiv:2112.00459.

    Example:
        >>> loss = ITRD(student_dim=4, teacher_dim=8)
        >>> loss(torch.randn(6, 4), torch.randn(6, 8)).shape
        torch.Size([])
    """

    reference = Reference(
        "miles2022itrd",
        "read in code",
        source="roymiles/ITRD, distiller_zoo/IT.py, helper/loops.py and train_student.py",
        weight=1.0,
        weight_note="with 2 and 0.05 inside, CIFAR-100, the authors' defaults",
        result="CIFAR-100 resnet32x4 to resnet8x4: 76.69 (student alone 72.50), the authors' README",
    )
    embed: nn.Linear

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        correlation_weight: float = 2.0,
        mutual_weight: float = 0.05,
        alpha: float = 1.5,
    ) -> None:
        super().__init__()
        check_positive("ITRD", alpha=alpha)
        self.correlation_weight, self.mutual_weight, self.alpha = correlation_weight, mutual_weight, alpha
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.embed = nn.Linear(student_dim, teacher_dim, dtype=torch.float32)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        # correlations do not depend on the bias, beside which small differences would be lost; it stays in the graph
        mapped = F.linear(centre_columns(student).to(student.dtype), self.embed.weight) + 0 * self.embed.bias
        own = student if student.shape[1] == teacher.shape[1] else mapped + self.embed(student.mean(0, keepdim=True))
        correlation = correlation_loss(mapped, teacher, alpha=self.alpha)
        return self.correlation_weight * correlation + self.mutual_weight * mutual_information_loss(own, teacher)
