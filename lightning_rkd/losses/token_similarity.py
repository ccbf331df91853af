"""Token similarities as distributions, the local part of lightly-train's distillation."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.checks import check_positive
from lightning_rkd.losses.parts.tokens import TokenLoss


class TokenSimilarity(TokenLoss):
    r"""Matches, for each token, the distribution of its similarities to the tokens of the same image.

    .. math::
        L = \frac{1}{N T} \sum_{n,i} \mathrm{KL}\Big(\sigma_j\big(\langle \hat t_{ni}, \hat t_{nj} \rangle / \tau\big)
        \,\Big\Vert\, \sigma_j\big(\langle \hat s_{ni}, \hat s_{nj} \rangle / \tau\big)\Big)

    where i and j count the T tokens of image n. The widths may differ: only similarities within each network enter.

    Departure: the published code maps the student's tokens to the teacher's width by a trained linear layer first,
    which is left out when the student is used; here the similarities are those of the student's own tokens. The
    student's grid is interpolated to the teacher's (bilinear), as there. The global part of that method is
    ``CSD(bank_size=8192, student_temperature=0.07, teacher_temperature=0.07)`` on embeddings. Several maps are summed.

    Shapes: lists of as many tokens (N, T, C) or maps (N, C, H, W) -> scalar.

    Args:
        temperature: :math:`\tau`.
        student_prefix: Number of class and register tokens that come before the student's patches, which are left
            out. A map has none.
        teacher_prefix: The same of the teacher: 5 for DINOv3 and for DINOv2 with registers, 1 for a plain ViT.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Lightly AG 2026, LightlyTrain: distillation of vision foundation models,
        https://github.com/lightly-ai/lightly-train.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.eye(2)[None]
        >>> TokenSimilarity(temperature=1.0)([student], [teacher])
        tensor(0.0540)
    """

    reference = Reference(
        "lightly2026lightlytrain",
        "read in code",
        source="lightly-ai/lightly-train, _methods/distillationv3/distillationv3_loss.py",
        weight=1.0,
        weight_note="beside the queue of embeddings, the default of that code",
    )

    def __init__(self, temperature: float = 0.07, **tokens: Any) -> None:
        super().__init__(**tokens)
        check_positive("TokenSimilarity", temperature=temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(x.flatten(0, 1) / self.temperature, dim=1) for x in (student, teacher))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
