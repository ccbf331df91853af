"""Rank order preservation (Wu, Wang, Zhou and Li 2023): the order in which the teacher's rows are retrieved."""

import torch
from torch import Tensor

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss, most_similar
from lightning_rkd.losses.parts.checks import check_at_least, check_positive

_SHARP = 1e-6  # the temperature of the teacher's comparisons


class ROP(AnchoredLoss):
    r"""Matches which of the teacher's rows come before which, when the student queries and when the teacher does.

    .. math::
        L = \frac{1}{N k} \sum_i \sum_{a, b = 1}^k w_{ia} \Big[ \varsigma\Big(\frac{T_{ib} - T_{ia}}{10^{-6}}\Big)
        - \varsigma\Big(\frac{X_{ib} - T_{ia}}{\tau}\Big) \Big]^2, \qquad
        w_{ia} = a\, \frac{e^{\rho T_{ia}}}{\sum_b e^{\rho T_{ib}}}

    where a and b count the k samples most similar to sample i in the teacher, itself first;
    :math:`T_{ia} = \langle \hat t_i, \hat t_a \rangle`, :math:`X_{ia} = \langle \hat s_i, \hat t_a \rangle` and
    :math:`\varsigma` is the logistic function. The student's similarities are compared with the teacher's, not with one
    another, as in the code that this follows.

    The gallery is the batch, as in that code; in the paper it is the teacher's rows of the training set. Memory grows
    with N k^2.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of fewer than k rows is ranked as a whole.

    Args:
        top_k: k.
        temperature: :math:`\tau`.
        rank_weight: :math:`\rho`.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Wu, Wang, Zhou and Li 2023, A General Rank Preserving Framework for Asymmetric Image Retrieval, ICLR.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
        >>> ROP()(student, teacher)
        tensor(0.0842)
    """

    reference = Reference(
        "wu2023general",
        "read in code",
        source="SCY-X/D3still, AIR_Distiller/distillers/ROP.py, by other authors",
        weight=1.0,
        weight_note="metric learning with cross-entropy and a triplet loss, 256 images, the same code",
    )

    def __init__(
        self, top_k: int = 96, temperature: float = 0.1, rank_weight: float = 0.2, **sizes: int | None
    ) -> None:
        super().__init__(**sizes)
        check_at_least("ROP", 1, top_k=top_k)
        check_positive("ROP", temperature=temperature)
        self.top_k, self.temperature, self.rank_weight = top_k, temperature, rank_weight

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        own = teacher @ teacher.T
        near = most_similar(own, self.top_k)
        t, x = own.gather(1, near), (student @ teacher.T).gather(1, near)
        before = torch.sigmoid((t[:, None] - t[:, :, None]) / _SHARP)
        gaps = before - torch.sigmoid((x[:, None] - t[:, :, None]) / self.temperature)
        ranks = torch.arange(1, t.shape[1] + 1, dtype=t.dtype, device=t.device)
        weights = (self.rank_weight * t).softmax(1) * ranks
        return (gaps.square().sum(2) * weights).sum(1).mean() / t.shape[1]
