"""Streamlined knowledge distillation (Jeong, Lee and Choi 2026): directions of logits, in a whitened space."""

import torch
from torch import Tensor

from lightning_rkd.functional.distances import safe_sqrt
from lightning_rkd.functional.scales import to_float64
from lightning_rkd.functional.similarities import cosine_similarities
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_positive


class SKDDirection(RelationalLoss):
    r"""Mahalanobis length of the differences between the cosines of the student's logits and the teacher's.

    .. math::
        L = \frac{1}{N} \sum_i \sqrt{D_i^\top (\Sigma + \lambda I)^{-1} D_i}, \qquad
        D = \hat z^s \hat z^{s\top} - \hat z^t \hat z^{t\top}

    :math:`\hat z` are logits divided by their norm, :math:`D_i` the rows of the N x N matrix D and :math:`\Sigma` their
    covariance, through which the gradient flows. The numbers of classes may differ.

    Departures: this is the paper's equation, as torchdistill has it. The authors' code divides the cosines by the
    number of classes K, which is the same as ``tikhonov`` = :math:`0.1 K^2`, and multiplies the loss, a mean already,
    by a mask of the classes of which the teacher is less sure than the median, which halves it. Their method adds
    :class:`SoftTarget`, halved in the same way. One row has no covariance; here it is 0.

    Shapes: (N, K_s), (N, K_t) -> scalar; of dense logits, an image is one vector. One row gives 0.

    Args:
        tikhonov: :math:`\lambda`; 0.1 in the authors' code.

    Reference:
        Jeong, Lee and Choi 2026, Streamlined Knowledge Distillation, CVPR.

    Example:
        >>> SKDDirection()(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(2.3355)
    """

    reads = "logits"
    invariances = frozenset({"rotation", "scale", "row scale"})
    reference = Reference(
        "jeong2026streamlined",
        "read in code",
        source="yoshitomo-matsubara/torchdistill, torchdistill/losses/mid_level.py; HyunJunSik/StreamLined, "
        "Distiller/SKD.py",
        weight=0.9,
        weight_note="CIFAR-100, with 0.9 on soft targets and 0.1 on the task loss (0.5 each for resnet32x4 to "
        "resnet8x4), both halved by masks and cosines divided by 100, the authors' code",
        result="CIFAR-100 resnet32x4 to resnet8x4: 78.33 (student alone 72.48), the authors",
    )

    def __init__(self, tikhonov: float = 0.1) -> None:
        super().__init__()
        check_positive("SKDDirection", tikhonov=tikhonov)
        self.tikhonov = tikhonov

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        s, t = (cosine_similarities(to_float64(z.flatten(1))) for z in (student, teacher))
        gaps = s - t
        centred = gaps - gaps.mean(0)
        spread = centred.T @ centred / max(1, n - 1) + self.tikhonov * torch.eye(n, dtype=s.dtype, device=s.device)
        whitened = torch.linalg.solve_ex(spread, gaps.T).result  # unlike solve, it lets no host wait for a device
        squared = (gaps * whitened.T).sum(1)
        return safe_sqrt(squared).mean().to(student.dtype)
