"""Probabilistic Knowledge Transfer (Passalis and Tefas 2018): probabilities of the neighbours within a batch."""

import torch
from torch import Tensor

from lightning_rkd.functional.angles import Reduction, check_reduction
from lightning_rkd.functional.scales import far_above_rounding, to_float64
from lightning_rkd.functional.similarities import cosine_similarities
from lightning_rkd.losses.base import Reference, RelationalLoss

_EPS = 1e-7  # of the authors' code, in the norms and in the logarithm


def pkt(student: Tensor, teacher: Tensor, *, reduction: Reduction = "official") -> Tensor:
    """PKT as a function; see :class:`PKT`."""
    check_reduction(reduction)
    q, p = (_probabilities(x, reduction) for x in (student, teacher.detach()))
    n = len(student)
    count = n * n if reduction == "official" else max(1, n * (n - 1))
    return ((p * ((p + _EPS) / (q + _EPS)).log()).sum() / count).to(student.dtype)  # p or q may be float64


class PKT(RelationalLoss):
    r"""Divergence between the probabilities with which a sample picks each other one as its neighbour.

    .. math::
        L = \frac{1}{N^2} \sum_{i,j} p_{ij} \log \frac{p_{ij} + \varepsilon}{q_{ij} + \varepsilon}, \qquad
        p_{ij} = \frac{k(t_i, t_j)}{\sum_m k(t_i, t_m)}, \quad k(a, b) = \frac{\cos(a, b) + 1}{2}

    with :math:`q` of the student, :math:`\varepsilon = 10^{-7}`. The loss does not change when either embedding is
    rotated; norms matter only through the same :math:`\varepsilon`, which is added to them.

    Departures: the paper leaves pairs of a sample with itself out and takes the sum over all others; the authors' code
    keeps them and takes the mean over all N^2, on which published weights rest. Both are here. A zero row has cosine 0
    to all, as in their code, but passes no gradient, where theirs is NaN.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of one row gives 0.

    Args:
        reduction: ``"official"`` as the authors' code; ``"distinct"`` as the paper, over the N (N - 1) pairs i != j in
            the sums and in the mean.

    Reference:
        Passalis and Tefas 2018, Learning Deep Representations with Probabilistic Knowledge Transfer, arXiv:1803.10837.

    Example:
        >>> student, teacher = torch.eye(3), torch.tensor([[1.0], [1.0], [-1.0]])
        >>> PKT()(student, teacher), PKT("distinct")(student, teacher)
        (tensor(0.1540), tensor(0.2310))
    """

    reference = Reference(
        "passalis2018learning",
        "read in code",
        source="passalis/probabilistic_kt, nn/pkt.py",
        weight=30000.0,
        weight_note="CIFAR-100, RepDistiller",
        result="CIFAR-100 resnet32x4 to resnet8x4: 73.64 (student alone 72.50), RepDistiller",
    )
    invariances = frozenset({"rotation"})

    def __init__(self, reduction: Reduction = "official") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt(student, teacher, reduction=self.reduction)


def _kernel(x: Tensor) -> Tensor:
    return ((cosine_similarities(x, eps=_EPS) + 1) / 2).clamp(min=0)  # rounding may leave a cosine below -1


def _probabilities(x: Tensor, reduction: Reduction) -> Tensor:
    kernel = _kernel(x)
    if not far_above_rounding(kernel):  # of opposite rows float32 leaves about the 1e-7 that they are compared with
        kernel = _kernel(to_float64(x))
    if reduction == "distinct":
        kernel = kernel * (1 - torch.eye(len(x), dtype=kernel.dtype, device=x.device))
    total = kernel.sum(1, keepdim=True)
    rounding = 4 * len(x) * torch.finfo(kernel.dtype).eps
    nonzero = total > rounding  # else the sample is opposite to all others, or alone
    return kernel / torch.where(nonzero, total, 1)
