"""VkD (Miles, Elezi and Deng 2024): an orthogonal projection onto the normalised embedding of the teacher."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.functional.scales import limit_magnitude
from lightning_rkd.losses.base import Reference, RelationalLoss


def orthonormal(x: Tensor) -> Tensor:
    r"""Orthonormal factor Q of a matrix, with a positive diagonal of R: orthonormal columns, or rows if it is wide."""
    if x.shape[0] < x.shape[1]:
        return orthonormal(x.T).T
    q, r = torch.linalg.qr(x)
    unit: Tensor = q * r.diagonal().sign()
    return unit


class VkD(RelationalLoss):
    r"""Compares the student's embedding with the normalised teacher's after an orthogonal projection.

    .. math:: L = \frac{1}{N D_t} \sum_{n,d} h\big((P s_n)_d - \mathrm{LN}(t_n)_d\big), \qquad
        P^\top P = I, \quad h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    An orthogonal P keeps all angles and norms of the student's batch, so that the student must learn the teacher's
    relations, and the projection cannot. LN shifts and scales every row of the teacher to mean 0 and
    variance 1, without parameters: the paper's normalisation for classification. Where the teacher is narrower,
    :math:`P P^\top = I` instead.

    Departures: the authors' code keeps P orthogonal with ``torch.nn.utils.parametrizations.orthogonal``, which cannot
    be pickled; here P is the orthonormal factor of a free matrix. Both reach every such P, on different paths.

    Shapes: student (N, D_s), teacher (N, D_t) -> scalar.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Miles, Elezi and Deng 2024, VkD: Improving Knowledge Distillation using Orthogonal Projections,
        arXiv:2403.06213.

    Example:
        >>> loss = VkD(student_dim=1, teacher_dim=2)
        >>> loss.matrix.data = torch.tensor([[3.0], [4.0]])  # P = (0.6, 0.8)
        >>> round(loss(torch.ones(1, 1), torch.tensor([[0.0, 2.0]])).item(), 3)
        0.56
    """

    gather = False
    aligns = True  # LN changes a row's mean and length, not the rest of its direction
    reference = Reference(
        "miles2024vkd",
        "read in code",
        source="roymiles/VkD, engine.py and train.py",
        weight=1.0,
        weight_note="ImageNet, the authors' default",
        result="ImageNet RegNetY-160 to DeiT-Ti: 78.3, on one GPU 79.2, the authors' README",
    )
    matrix: nn.Parameter

    def __init__(self, student_dim: int | None = None, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.matrix = nn.Parameter(orthonormal(torch.randn(teacher_dim, student_dim, dtype=torch.float32)))

    def project(self, rows: Tensor) -> Tensor:
        """Rows of the student in the teacher's space, (N, D_s) -> (N, D_t)."""
        return rows @ orthonormal(self.matrix).T

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        target = F.layer_norm(limit_magnitude(teacher, 1), teacher.shape[1:])
        return F.smooth_l1_loss(self.project(student), target)
