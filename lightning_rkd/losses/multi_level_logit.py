"""Multi-level logit distillation (Jin, Wang and Lin 2023): relations of classes and of samples, by probabilities."""

from collections.abc import Sequence

from torch import Tensor

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_logits, check_positive


class MultiLevelLogit(RelationalLoss):
    r"""Matches inner products of class probabilities between classes and between samples, at several temperatures.

    .. math::
        L = \sum_T \frac{\beta}{K} \lVert P^\top P - Q^\top Q \rVert_F^2 + \frac{\gamma}{N} \lVert P P^\top - Q Q^\top
        \rVert_F^2, \qquad P = \sigma(z^s / T), \quad Q = \sigma(z^t / T)

    with the softmax :math:`\sigma` over classes. The loss does not change when a constant is added to all logits of a
    sample.

    These are two of the paper's three levels. Add the third, between instances, as
    ``sum(SoftTarget(T) for T in (2, 3, 4, 5, 6))``.

    Departure: the authors' code multiplies each term, a mean already, by a mask over the samples (classes) of which the
    teacher is no surer than the median, and takes the mean again. It thus only halves the terms (exactly, where their
    number is even and no two are equally sure), and nothing is masked here. It reads weakly augmented images only.

    Shapes: (N, K), (N, K) -> scalar.

    Args:
        temperatures: All T.
        class_weight: :math:`\beta`.
        batch_weight: :math:`\gamma`.

    Reference:
        Jin, Wang and Lin 2023, Multi-Level Logit Distillation, CVPR.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> MultiLevelLogit()(logits, logits.flip(0)), MultiLevelLogit()(0 * logits, logits)
        (tensor(0.), tensor(0.0621))
    """

    reads = "logits"
    invariances = frozenset({"row shift"})
    reference = Reference(
        "jin2023multi",
        "read in code",
        source="Jin-Ying/Multi-Level-Logit-Distillation, mdistiller/distillers/KD_ours.py",
        weight=0.45,
        weight_note="CIFAR-100, with 0.1 on the task loss and soft targets at five temperatures, the authors' 0.9 "
        "halved by their masks",
        result="CIFAR-100 resnet32x4 to resnet8x4: 77.08 (student alone 72.50), with soft targets, the authors",
    )

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        class_weight: float = 1.0,
        batch_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(temperatures, Sequence) or not temperatures:
            raise ValueError(f"MultiLevelLogit: temperatures must be a list of at least one, got {temperatures!r}")
        for temperature in temperatures:
            check_positive("MultiLevelLogit", temperatures=temperature)
        check_at_least("MultiLevelLogit", 0, class_weight=class_weight, batch_weight=batch_weight)
        self.temperatures, self.class_weight, self.batch_weight = tuple(temperatures), class_weight, batch_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "MultiLevelLogit", dims=(2,))
        total = student.new_zeros(())
        for temperature in self.temperatures:
            p, q = ((z / temperature).softmax(1) for z in (student, teacher))
            classes, samples = p.T @ p - q.T @ q, p @ p.T - q @ q.T
            total = total + self.class_weight * classes.square().sum() / p.shape[1]
            total = total + self.batch_weight * samples.square().sum() / len(p)
        return total
