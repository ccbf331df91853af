"""Relational Knowledge Distillation (Park, Kim, Lu and Cho 2019): distances and angles within a batch."""

from dataclasses import replace

from torch import Tensor

from lightning_rkd.functional.angles import Reduction, check_reduction
from lightning_rkd.functional.rkd import check_sample, rkd_loss
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.utils.distributed import Shard

_REFERENCE = Reference(
    "park2019relational",
    "read in code",
    source="lenscloth/RKD, metric/loss.py",
    weight=1.0,
    weight_note="metric learning, with 1 and 2 inside; in classification 1 with 25 and 50 inside",
    result="CIFAR-100 ResNet50 to VGG11-BN: 72.97 (student alone 71.26). R@1 on CUB/Cars/SOP, BN-Inception-512 to "
    "itself: 70.9/88.9/78.5 (teacher 69.1/86.4/79.2: it is weak on SOP), LabelRelaxation",
)


def rkd_distance(student: Tensor, teacher: Tensor, *, reduction: Reduction = "official") -> Tensor:
    """RKD-D as a function; see :class:`RKDDistance`."""
    return rkd_loss(student, teacher, angle_weight=0, reduction=reduction)


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Reduction = "official",
    sampled_anchors: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """RKD-A as a function; see :class:`RKDAngle`."""
    return rkd_loss(
        student,
        teacher,
        distance_weight=0,
        angle_weight=1,
        reduction=reduction,
        sampled_anchors=sampled_anchors,
        shard=shard,
    )


class RKDDistance(RelationalLoss):
    r"""RKD-D: compares pairwise distances within the batch, in units of their mean.

    .. math::
        L = \frac{1}{N^2} \sum_{i,j} h\!\left(\frac{\lVert s_i - s_j \rVert}{\mu_s} -
        \frac{\lVert t_i - t_j \rVert}{\mu_t}\right), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    :math:`\mu` is the mean of a network's strictly positive distances; the student's is part of the graph. The loss
    does not change when either embedding is moved, rotated or scaled.

    Departures from the authors' code: distances are exact (float64, centred) where theirs are clamped at 1e-6, and
    duplicates have distance 0 and pass no gradient. Theirs turns NaN there in float16, and far from the origin its
    float32 distances are mostly rounding. On ordinary batches the two agree to rounding.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of one row gives 0.

    Args:
        reduction: ``"official"`` takes the mean over all N^2 entries, zeros of the diagonal included, as the authors'
            code does and published weights assume; ``"distinct"`` over the N (N - 1) pairs i != j, as the paper
            writes it.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> import torch
        >>> loss = RKDDistance()
        >>> loss(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(0.0139)
    """

    reference = replace(
        _REFERENCE,
        weight_note="metric learning; 25 in classification",
        result="CIFAR-100 ResNet50 to VGG11-BN: 72.27 (student alone 71.26)",
    )
    invariances = frozenset({"translation", "rotation", "scale"})

    def __init__(self, reduction: Reduction = "official") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_loss(student, teacher, angle_weight=0, reduction=self.reduction)


class RKDAngle(RelationalLoss):
    r"""RKD-A: compares the angles spanned by triplets of the batch.

    .. math::
        L = \frac{1}{N^3} \sum_{j,i,k} h\big(\cos \angle s_i s_j s_k - \cos \angle t_i t_j t_k\big), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    The loss does not change when either embedding is moved, rotated or scaled.

    Departures from the authors' code: theirs builds N x N x D and N x N x N tensors; here the law of cosines gives the
    same angles from N x N distances, with O(N^2) memory, many times faster and equal to rounding
    (:func:`~lightning_rkd.functional.angles.angle_loss`). An angle at a vertex that coincides with another corner has
    cosine 0, as in theirs, but passes no gradient, where theirs divides by 1e-12.

    Shapes: (N, D_s), (N, D_t) -> scalar. One row, or two different ones, give 0.

    Args:
        reduction: ``"official"`` takes the mean over all N^3 entries, degenerate ones included, as the authors' code
            does and published weights assume; ``"distinct"`` over the N (N - 1) (N - 2) triplets of different rows, as
            the paper writes it.
        sampled_anchors: For batches of thousands: work on the angles at this many vertices m, drawn anew in each step
            from PyTorch's random numbers, instead of all N. Time falls by m / N, and the loss and its gradient are
            unbiased estimates; the loss varies by :math:`\sqrt{(1/m - 1/N)\,\mathrm{Var}_j(\ell_j)}` around its
            value, with :math:`\ell_j` the mean over the triplets at vertex j. ``None`` is exact.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> import torch
        >>> loss = RKDAngle(reduction="distinct")
        >>> loss(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3))
        tensor(0.0560)
    """

    reference = replace(_REFERENCE, weight=2.0, weight_note="metric learning; 50 in classification", result="")
    invariances = frozenset({"translation", "rotation", "scale"})

    def __init__(self, reduction: Reduction = "official", sampled_anchors: int | None = None) -> None:
        super().__init__()
        check_reduction(reduction)
        check_sample(sampled_anchors)
        self.reduction, self.sampled_anchors = reduction, sampled_anchors

    def forward(self, student: Tensor, teacher: Tensor, *, shard: Shard | None = None) -> Tensor:
        """The loss as a scalar; ``shard`` splits the work over ranks that hold the same batch."""
        return rkd_angle(student, teacher, reduction=self.reduction, sampled_anchors=self.sampled_anchors, shard=shard)


class RKD(RelationalLoss):
    r"""RKD-DA: compares distances and angles, from distances that are computed once.

    .. math:: L = \lambda_D L_D + \lambda_A L_A

    with :math:`L_D` of :class:`RKDDistance` and :math:`L_A` of :class:`RKDAngle`, whose notes on the authors' code
    hold here too.

    Shapes: (N, D_s), (N, D_t) -> scalar.

    Args:
        distance_weight: :math:`\lambda_D`; 1 in the authors' metric learning, 25 in classification.
        angle_weight: :math:`\lambda_A`; 2 in the authors' metric learning, 50 in classification.
        reduction: ``"official"`` or ``"distinct"``, for both parts.
        sampled_anchors: Work on the angles at this many vertices only, see :class:`RKDAngle`; distances are exact.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
        >>> RKD()(student, teacher)
        tensor(0.0347)
        >>> (1 * RKDDistance() + 2 * RKDAngle())(student, teacher)
        tensor(0.0347)
    """

    reference = _REFERENCE
    invariances = frozenset({"translation", "rotation", "scale"})

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        reduction: Reduction = "official",
        sampled_anchors: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_sample(sampled_anchors)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.reduction, self.sampled_anchors = reduction, sampled_anchors

    def forward(self, student: Tensor, teacher: Tensor, *, shard: Shard | None = None) -> Tensor:
        """The loss as a scalar; ``shard`` splits the angles over ranks that hold the same batch."""
        return rkd_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            reduction=self.reduction,
            sampled_anchors=self.sampled_anchors,
            shard=shard,
        )
