"""Soft targets (Hinton, Vinyals and Dean 2015): the teacher's class probabilities, softened by a temperature."""

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits, check_positive, pixels_as_rows, standardise_rows


def soft_target(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, standardise: bool = False) -> Tensor:
    """Hinton's loss as a function; see :class:`SoftTarget`."""
    check_logits(student, teacher, "SoftTarget")
    check_positive("SoftTarget", temperature=temperature)
    s, t = (pixels_as_rows(z) for z in (student, teacher.detach()))
    if standardise:
        s, t = standardise_rows(s), standardise_rows(t)
    s, t = (F.log_softmax(z / temperature, dim=1) for z in (s, t))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


class SoftTarget(RelationalLoss):
    r"""Divergence between the class probabilities of teacher and student, softened by a temperature.

    .. math::
        L = \frac{T^2}{N} \sum_i \mathrm{KL}\big(\sigma(z^t_i / T) \,\Vert\, \sigma(z^s_i / T)\big)

    :math:`\sigma` is the softmax over classes. The factor :math:`T^2` keeps the gradient's size when T changes. The
    loss does not change when a constant is added to all logits of a sample, in either network.

    Departures: the paper minimises the cross-entropy with the soft targets, which differs by the teacher's entropy, a
    constant; published code takes this divergence. Dense logits are compared pixel by pixel, as distillation for
    segmentation does; the mean then runs over pixels too.

    Shapes: (N, K) or (N, K, H, W) of both networks -> scalar.

    Args:
        temperature: T; 4 in published comparisons.
        standardise: Take the z-score of each row of logits, in both networks, before the temperature
            (:func:`~lightning_rkd.losses.parts.checks.standardise_rows`). Its
            authors use a temperature of 2 and a weight of 9 on CIFAR-100, beside a task loss of weight 0.1, and reach
            76.62 for resnet32x4 to resnet8x4.

    Reference:
        Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    Example:
        >>> import torch
        >>> SoftTarget()(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]))
        tensor(1.7751)
    """

    reads = "logits"
    gather = False
    invariances = frozenset({"row shift"})
    reference = Reference(
        "hinton2015distilling",
        "read in code",
        source="HobbitLong/RepDistiller, distiller_zoo/KD.py",
        weight=0.9,
        weight_note="CIFAR-100, RepDistiller, with 0.1 on the task loss",
        result="CIFAR-100 resnet32x4 to resnet8x4: 73.33 (student alone 72.50), RepDistiller",
    )

    def __init__(self, temperature: float = 4.0, *, standardise: bool = False) -> None:
        super().__init__()
        check_positive("SoftTarget", temperature=temperature)
        self.temperature, self.standardise = temperature, standardise

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_target(student, teacher, temperature=self.temperature, standardise=self.standardise)
