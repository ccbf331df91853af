"""CKD (Zhu, Zhou, Zhu, Wang and Hu 2024): contrasts the logits of the same sample with those of the others."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits, check_positive


class SampleContrastiveKD(RelationalLoss):
    r"""Contrasts the student's logits of the same sample with those of the other samples, for each row of the teacher.

    .. math::
        L = -\frac{1}{N} \sum_i \log \frac{\exp(\cos(z^t_i, z^s_i) / \tau)}{\sum_j \exp(\cos(z^t_i, z^s_j) / \tau)}

    The anchors are the teacher's rows. The loss does not change when the logits of a sample are multiplied by a
    positive number, in either network. It depends on the batch size: its value for a perfect student grows like
    :math:`\log N`.

    Departures: a sample whose logits are all 0 has cosine 0 to everything and passes no gradient, where the authors'
    code divides by 1e-12.

    Shapes: (N, K), (N, K) -> scalar. One row gives 0.

    Args:
        temperature: :math:`\tau`; the authors use 1 throughout.

    Reference:
        Zhu et al. 2024, CKD: Contrastive Knowledge Distillation from A Sample-wise Perspective, arXiv:2404.14109.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> loss = SampleContrastiveKD()
        >>> loss(logits, logits), loss(logits.flip(0), logits)
        (tensor(0.3133), tensor(1.3133))
    """

    reads = "logits"
    invariances = frozenset({"scale", "row scale"})
    reference = Reference(
        "zhu2024ckd",
        "read in code",
        source="ZhouXinzzzzz/CKD, mdistiller/distillers/CKD.py",
        weight=100.0,
        weight_note="CIFAR-100, batch 64, 480 epochs; 10 on ImageNet",
        result="CIFAR-100 resnet32x4 to resnet8x4: 76.62 (student alone 72.50), as reported by PCKD",
    )

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive("SampleContrastiveKD", temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "SampleContrastiveKD", dims=(2,))
        similarity = unit_rows(teacher) @ unit_rows(student).T
        return F.cross_entropy(similarity / self.temperature, torch.arange(len(student), device=student.device))
