"""Transformed teacher matching (Zheng and Yang 2024): a temperature for the teacher alone."""

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits, check_positive, pixels_as_rows


class TTM(RelationalLoss):
    r"""Divergence between the teacher's probabilities after a power transform and the student's.

    .. math::
        L = \frac{1}{N} \sum_i \mathrm{KL}\big(\hat p_i \,\Vert\, \sigma(z^s_i)\big), \qquad
        \hat p_{ik} = \frac{p_{ik}^\gamma}{\sum_j p_{ij}^\gamma}, \quad p_i = \sigma(z^t_i)

    The power transform is a temperature :math:`1/\gamma` on the teacher alone: against soft targets the student
    loses its temperature, which adds a Rényi entropy that keeps it from being overconfident. The loss does not change
    when a constant is added to all logits of a sample.

    Departures: powers are computed from logarithms, in which probabilities do not underflow. Dense logits are
    compared pixel by pixel, which the paper does not consider.

    Shapes: (N, K) or (N, K, H, W) of both networks -> scalar.

    Args:
        exponent: :math:`\gamma`; 0.1 to 0.4 on CIFAR-100, with a weight that was tuned for each pair of networks.

    Reference:
        Zheng and Yang 2024, Knowledge Distillation Based on Transformed Teacher Matching, arXiv:2402.11148.

    Example:
        >>> import torch
        >>> TTM(exponent=0.5)(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]))
        tensor(0.3278)
    """

    reads = "logits"
    gather = False
    invariances = frozenset({"row shift"})
    _weighted = False
    reference = Reference(
        "zheng2024knowledge",
        "read in paper",
        source="its equation 2 and algorithm 1; zkxufo/TTM, distiller_zoo/ttm.py",
        weight=100.0,
        weight_note="CIFAR-100 resnet32x4 to resnet8x4, exponent 0.1; 7 to 101 for other pairs; 45 for vgg13 to vgg8 "
        "in the authors' repository",
        result="CIFAR-100 resnet32x4 to resnet8x4: 76.17 (student alone 72.50), the authors",
    )

    def __init__(self, exponent: float = 0.1) -> None:
        super().__init__()
        check_positive(self.display_name, exponent=exponent)
        self.exponent = exponent

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, self.display_name)
        powers = self.exponent * F.log_softmax(pixels_as_rows(teacher), dim=1)
        log_q = F.log_softmax(pixels_as_rows(student), dim=1)
        divergence = F.kl_div(log_q, powers.log_softmax(1), reduction="none", log_target=True).sum(1)
        return (powers.logsumexp(1).exp() * divergence if self._weighted else divergence).mean()


class WTTM(TTM):
    r"""Transformed teacher matching, each sample weighted by the smoothness of the teacher's probabilities.

    .. math::
        L = \frac{1}{N} \sum_i U_\gamma(p_i)\, \mathrm{KL}\big(\hat p_i \,\Vert\, \sigma(z^s_i)\big), \qquad
        U_\gamma(p) = \sum_k p_k^\gamma

    with :math:`p` and :math:`\hat p` as in :class:`TTM`, whose notes hold here too. The power sum :math:`U_\gamma` is
    1 for a one-hot and :math:`K^{1 - \gamma}` for a uniform prediction, so loss weights are smaller than TTM's.

    Shapes: (N, K) or (N, K, H, W) of both networks -> scalar.

    Args:
        exponent: :math:`\gamma`.

    Reference:
        Zheng and Yang 2024, Knowledge Distillation Based on Transformed Teacher Matching, arXiv:2402.11148.

    Example:
        >>> import torch
        >>> WTTM(exponent=0.5)(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]))
        tensor(0.3688)
    """

    _weighted = True
    reference = Reference(
        "zheng2024knowledge",
        "read in paper",
        source="its section 4 and algorithm 1; zkxufo/TTM, distiller_zoo/wttm.py",
        weight=3.0,
        weight_note="CIFAR-100 resnet32x4 to resnet8x4, exponent 0.1; 1.4 to 16 for other pairs; 1.6 on ImageNet, "
        "exponent 0.8",
        result="CIFAR-100 resnet32x4 to resnet8x4: 76.06 (student alone 72.50), the authors",
    )
