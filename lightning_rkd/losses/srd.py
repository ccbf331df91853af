"""SRD (Miles and Mikolajczyk 2024): a projector, a normalisation and a soft maximum."""

import torch
from torch import Tensor, nn

from lightning_rkd.functional.scales import centre_columns
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive


def log_sum(student: Tensor, teacher: Tensor, *, power: float = 4.0, eps: float = 1e-5) -> Tensor:
    """SRD after the projector as a function; see :class:`SRD`."""
    if len(student) == 1:
        return student.sum() * 0
    differences = _standardised(student) - _standardised(teacher.detach())
    return (differences.abs().pow(power).sum() + eps).log().to(student.dtype)


def _standardised(x: Tensor) -> Tensor:
    """Columns with mean 0 and variance 1: batch normalisation in training mode, without running statistics."""
    rows = centre_columns(x)
    return rows * (rows.square().mean(0) + 1e-4).rsqrt()  # 1e-4 as in the authors' ImageNet code


class SRD(RelationalLoss):
    r"""Matches the projected student to the teacher, every column standardised over the batch.

    .. math::
        L = \log\Big(\varepsilon + \sum_{i,d} \big|\,\mathrm{BN}(W s)_{id} - \mathrm{BN}(t)_{id}\,\big|^{\alpha}\Big)

    BN is batch normalisation without scale and shift; W is trained with the student. The logarithm of a sum of high
    powers is a soft maximum, which concentrates on few entries where the student lacks capacity. The loss does not
    change when either embedding is moved, and leaves mean and scale of every column of W s free, so that it does not
    bring the student into the teacher's space. The sum runs over samples, so the value grows like :math:`\log N`; the
    gradient does not.

    The authors add Hinton's loss at temperature 1: ``2 * SRD() + SoftTarget(1)``.

    Departures from the authors' ImageNet code: :math:`\varepsilon`, without which a perfect match has loss
    :math:`-\infty` (the value is that of their DeiT code, whose other form, a correlation per column, is not
    offered); statistics are always those of the batch, all ranks together, where theirs would be running means in
    evaluation; no bias in the projector, since BN takes it away.

    Shapes: (N, D_s), (N, D_t) -> scalar. One row gives 0.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        power: :math:`\alpha`.
        eps: :math:`\varepsilon`.

    Reference:
        Miles and Mikolajczyk 2024, Understanding the Role of the Projector in Knowledge Distillation, arXiv:2303.11098.

    Example:
        >>> loss = SRD(student_dim=2, teacher_dim=3)
        >>> round(loss(torch.ones(4, 2), torch.ones(4, 3)).item(), 4)  # a perfect match: the logarithm of 1e-5
        -11.5129
    """

    invariances = frozenset({"translation"})
    reference = Reference(
        "miles2024understanding",
        "read in code",
        source="roymiles/Simple-Recipe-Distillation, imagenet/torchdistill/losses/single.py",
        weight=2.0,
        weight_note="ImageNet, with soft targets at temperature 1",
        result="ImageNet ResNet-34 to ResNet-18: 71.87, the authors' repository",
    )
    project: nn.Linear

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        power: float = 4.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_positive("SRD", eps=eps)
        check_at_least("SRD", 1, power=power)  # below 1 its gradient has no bound
        self.power, self.eps = power, eps
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.project = nn.Linear(student_dim, teacher_dim, bias=False, dtype=torch.float32)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        # standardising removes what all rows share, which would cost digits in the projector
        student = centre_columns(student).to(student.dtype)
        return log_sum(self.project(student), teacher, power=self.power, eps=self.eps)
