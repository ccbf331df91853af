"""Gram anchoring (Siméoni et al. 2025): cosines between the tokens of an image, in student and teacher."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.checks import check_choice
from lightning_rkd.losses.parts.tokens import TokenLoss

Negatives = Literal["zero", "teacher", "keep"]


class GramAnchoring(TokenLoss):
    r"""Matches the cosines between the tokens of each image.

    .. math::
        L = \frac{1}{N T^2} \sum_{n,i,j} \big([\langle \hat s_{ni}, \hat s_{nj} \rangle]_+
        - [\langle \hat t_{ni}, \hat t_{nj} \rangle]_+\big)^2

    where i and j count the T tokens of image n. The widths may differ: only similarities within each network enter.
    In the paper the teacher is an earlier state of the network itself.

    Where the numbers of tokens differ, the student's tokens are interpolated to the teacher's grid (bilinear), where
    the authors resize the teacher's. Several maps are summed.

    Shapes: lists of as many tokens (N, T, C) or maps (N, C, H, W) -> scalar.

    Args:
        negative_cosines: ``"zero"`` sets them to 0 in both networks, the default of the authors' class;
            ``"teacher"`` sets the teacher's to 0, and the student's at the same places, which the authors' code
            leaves; ``"keep"`` leaves all, as the paper's equation and the authors' training configuration do.
        student_prefix: Number of class and register tokens that come before the student's patches, which are left
            out. A map has none.
        teacher_prefix: The same of the teacher: 5 for DINOv3 and for DINOv2 with registers, 1 for a plain ViT.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Siméoni et al. 2025, DINOv3, arXiv:2508.10104.

    Example:
        >>> student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.eye(2)[None]
        >>> GramAnchoring()([student], [teacher])
        tensor(0.2500)
    """

    reference = Reference(
        "simeoni2025dinov3",
        "read in code",
        source="facebookresearch/dinov3, dinov3/loss/gram_loss.py; written from the equation",
        weight=2.0,
        weight_note="negative_cosines='keep', beside the losses of pre-training of a ViT-7B, the authors' settings",
    )

    def __init__(self, negative_cosines: Negatives = "zero", **tokens: Any) -> None:
        super().__init__(**tokens)
        check_choice("GramAnchoring", Negatives, negative_cosines=negative_cosines)
        self.negative_cosines = negative_cosines

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.negative_cosines == "teacher":
            student = torch.where((student < 0) & (teacher < 0), 0, student)
        elif self.negative_cosines == "zero":
            student = student.relu()
        return F.mse_loss(student, teacher if self.negative_cosines == "keep" else teacher.relu())
