"""DIST (Huang, You, Wang, Qian and Xu 2022): correlation of class probabilities instead of equality."""

import torch
from torch import Tensor

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits, check_positive, pixels_as_rows, standardise_rows

_EPS = 1e-8  # the authors'


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of ``a`` with that of ``b``; 0 where one is constant."""
    constant = torch.zeros((), dtype=torch.bool, device=a.device)
    centred, norms = [], []
    for x in (a, b):
        c = x - x.mean(1, keepdim=True)
        norm = torch.linalg.vector_norm(c, dim=1)
        constant = constant | (norm <= 4 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=1))
        centred.append(c)
        norms.append(norm)
    # Rounding errors of a constant row would be magnified 1e8 times: its covariance is not divided.
    return (centred[0] * centred[1]).sum(1) / torch.where(constant, 1, norms[0] * norms[1] + _EPS)


class DIST(RelationalLoss):
    r"""Correlates the student's class probabilities with the teacher's, over classes and over samples.

    .. math::
        L = \tau^2 \left[ \beta \Big(1 - \frac{1}{N} \sum_i \rho(p^s_{i\cdot}, p^t_{i\cdot})\Big) +
        \gamma \Big(1 - \frac{1}{K} \sum_k \rho(p^s_{\cdot k}, p^t_{\cdot k})\Big) \right], \qquad
        p = \sigma(z / \tau)

    :math:`\rho` is Pearson's correlation, :math:`\sigma` the softmax over classes. Rows relate the classes of a sample
    (the paper's inter-class relation), columns the samples of a class (intra-class). Correlation does
    not penalise the larger scale of a strong teacher. The loss does not change when a constant is added to all logits
    of a sample.

    Departures: a constant row or column (a uniform prediction, a batch of one sample) correlates with nothing: its
    term is 1, to rounding, and its gradient that of the covariance, where the authors' code divides by 1e-8. Elsewhere
    the two agree to rounding, 1e-8 in the denominator included.

    Shapes: (N, K), or (N, K, H, W) with every pixel a sample, of both networks -> scalar.

    Args:
        inter_weight: :math:`\beta`, of the rows.
        intra_weight: :math:`\gamma`, of the columns.
        temperature: :math:`\tau`; 1 in the authors' ImageNet and segmentation settings, 4 on CIFAR-100.
        standardise: Take the z-score of each row of logits, in both networks, before the temperature
            (:func:`~lightning_rkd.losses.parts.checks.standardise_rows`).

    Reference:
        Huang, You, Wang, Qian and Xu 2022, Knowledge Distillation from A Stronger Teacher, arXiv:2205.10536.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]])
        >>> DIST()(student, teacher)
        tensor(1.3117)
    """

    reads = "logits"
    invariances = frozenset({"row shift"})
    reference = Reference(
        "huang2022knowledge",
        "read in code",
        source="hunto/image_classification_sota, lib/models/losses/dist_kd.py; hunto/DIST_KD, segmentation/losses",
        weight=2.0,
        weight_note="ImageNet with temperature=1 and CIFAR-100 with temperature=4",
        result="CIFAR-100 resnet32x4 to resnet8x4: 76.31 (student alone 72.50), the authors",
    )

    def __init__(
        self,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        *,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        check_positive("DIST", temperature=temperature)
        self.inter_weight, self.intra_weight, self.temperature = inter_weight, intra_weight, temperature
        self.standardise = standardise

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "DIST")
        s, t = pixels_as_rows(student), pixels_as_rows(teacher)
        if self.standardise:
            s, t = standardise_rows(s), standardise_rows(t)
        s, t = ((z / self.temperature).softmax(1) for z in (s, t))
        inter, intra = 1 - _pearson(s, t).mean(), 1 - _pearson(s.T, t.T).mean()
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)
