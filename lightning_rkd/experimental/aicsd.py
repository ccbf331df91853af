"""AICSD (Mansourian, Ahmadi and Kasaei 2023): similarities of the classes of a segmentation; an adaptive weight."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits


def inter_class_divergences(logits: Tensor) -> Tensor:
    r"""Divergences (N, K, K) of an image's classes as distributions over all pixels, from logits (N, K, H, W)."""
    log_q = F.log_softmax(logits.flatten(2), dim=2)
    # relative to the mean class: divergences of similar classes would be lost to cancellation
    relative = log_q - log_q.mean(1, keepdim=True)
    cross = log_q.exp() @ relative.mT
    return torch.diagonal(cross, dim1=1, dim2=2)[:, :, None] - cross


class AICSD(RelationalLoss):
    r"""Compares the divergences between the spatial distributions of the classes of an image.

    .. math::
        L = \frac{1}{N K^2} \sum_{n,k,l} \big(\hat D^s_{nkl} - \hat D^t_{nkl}\big)^2, \qquad
        D_{nkl} = \mathrm{KL}(q_{nk} \,\Vert\, q_{nl}), \quad q_{nk} = \sigma(z_{nk})

    The softmax runs over all pixels of class k's logits in image n; :math:`\hat D` has unit rows. The
    loss does not change when a constant is added to all logits of an image.

    The paper's adaptive weighting of three losses changes with the epoch: :class:`AdaptiveWeight` rises for the task
    loss and this one, and falls for pixel-wise distillation (:class:`~lightning_rkd.losses.SoftTarget` on dense
    logits).

    A reconstruction from the authors' description (softmax over flattened maps, divergences between all
    pairs of classes, mean squared error of the matrices); the body of the paper was not at hand. The unit rows
    come from the published code, which otherwise does something else: it applies the softmax over the height only,
    passes probabilities to a function that expects their logarithms, takes the divergence of a pair for that of its
    mirror image, counts 21 classes whatever the data, and averages divergences over the batch before it compares them.
    So no published weight or result belongs to this loss: the cosine of that code with it is 0.3.

    Logits that vary by less than 0.01 over an image have divergences too small for float32: what is compared then is
    mostly rounding (pass float64).

    Shapes: (N, K, H, W) of both networks, of one spatial size (the paper brings both to that of the image) -> scalar.
    One class gives 0.

    Reference:
        Mansourian, Ahmadi and Kasaei 2023, AICSD: Adaptive Inter-Class Similarity Distillation for Semantic
        Segmentation, arXiv:2308.04243.

    Example:
        >>> student, teacher = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]]), torch.zeros(1, 2, 1, 2)
        >>> AICSD()(student, teacher)
        tensor(0.5000)
        >>> total = {"similarity": AICSD() * AdaptiveWeight(120)}  # and task_weight=AdaptiveWeight(120)
    """

    reads = "logits"
    gather = False
    invariances = frozenset({"row shift"})
    reference = Reference(
        "mansourian2025aicsd",
        "reconstruction",
        source="AmirMansurian/AICSD: its description, which its code contradicts",
        result="none with this formula; the authors' 70.03 mIoU (Pascal VOC, DeepLabV3+, ResNet-101 to ResNet-18, "
        "student alone 67.50) was obtained with code that computes something else",
    )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "AICSD", dims=(4,))
        s, t = (unit_rows(inter_class_divergences(z).flatten(0, 1)) for z in (student, teacher))
        return (s - t).square().mean()


@dataclass(frozen=True)
class AdaptiveWeight:
    r"""AICSD's adaptive loss weighting: a weight that rises with the epoch, or its complement that falls.

    .. math:: a = \min(1, \text{epoch} / \text{epochs}), \qquad L = a\,(L_{task} + L_{AICSD}) + (1 - a)\, L_{pixel}

    A function of the epoch, for every place that takes a weight. As in the authors' code, the first epoch has a = 0 and
    trains on the teacher's pixels alone.

    Args:
        epochs: The epoch in which the full weight is reached; 120 in the paper.
        weight: The full weight.
        falling: Use :math:`1 - a`, the weight of the pixel-wise loss.

    Example:
        >>> AdaptiveWeight(120)(30), AdaptiveWeight(120, weight=10, falling=True)(30)
        (0.25, 7.5)
    """

    epochs: int = 120
    weight: float = 1.0
    falling: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"AdaptiveWeight: epochs must be at least 1, got {self.epochs}")

    def __call__(self, epoch: int) -> float:
        """The weight in that epoch."""
        a = min(1.0, epoch / self.epochs)
        return self.weight * (1 - a if self.falling else a)
