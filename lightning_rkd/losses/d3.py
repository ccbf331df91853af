"""Decoupled differential distillation (Xie et al. 2024): differences between similarities to the teacher's rows."""

import torch
from torch import Tensor

from lightning_rkd.functional.similarities import row_norms
from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss, most_similar
from lightning_rkd.losses.parts.checks import check_at_least


class D3(AnchoredLoss):
    r"""Matches the teacher's row, and differences between similarities to its nearest rows, apart by their order.

    .. math::
        L = \frac{\alpha}{N} \Big( \sum_i (T_{i1} - X_{i1})^2 \Big)^{1/2}
        + \frac{1}{N (k - 1)} \sum_i \Big[ \beta \big\lVert g_i \odot [\Delta T_i \odot \Delta X_i < 0] \big\rVert_2
        + \gamma \big\lVert g_i \odot [\Delta T_i \odot \Delta X_i > 0] \big\rVert_2 \Big], \qquad
        g_i = \frac{\Delta X_i - \Delta T_i}{0.1 + |\Delta T_i|}

    where :math:`T_{ia} = \langle \hat t_i, \hat t_a \rangle` and :math:`X_{ia} = \langle \hat s_i, \hat t_a \rangle`
    for the k samples a most similar to sample i in the teacher, itself first, and :math:`\Delta` are all differences
    between the entries 2 to k. :math:`\beta` weighs the pairs that the student puts in the wrong order.

    Departure: pairs of equal similarity in the teacher have no order and are left out, where the authors' code takes
    their difference for 1.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of fewer than k rows is used as a whole.

    Args:
        top_k: k, at least 2.
        alpha: Weight of the match of rows.
        beta: Weight of pairs in the wrong order.
        gamma: Weight of pairs in the right order.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Xie, Lin, Cai, Xu, Zhang, Du and He 2024, D3still: Decoupled Differential Distillation for Asymmetric Image
        Retrieval, CVPR.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
        >>> D3()(student, teacher)
        tensor(7.3223)
    """

    reference = Reference(
        "xie2024d3still",
        "read in code",
        source="SCY-X/D3still, AIR_Distiller/distillers/D3.py",
        weight=1.0,
        weight_note="metric learning with cross-entropy and a triplet loss, 256 images; alpha, beta and gamma of 100, "
        "5 and 1 for CUB, the authors",
        result="R@1 on CUB/In-Shop/SOP, student queries and the teacher's gallery, ResNet101 to ResNet18: "
        "64.46/83.96/68.42 (CSD 64.08/81.00/65.96), the authors",
    )

    def __init__(
        self, top_k: int = 10, alpha: float = 50.0, beta: float = 2.0, gamma: float = 1.0, **sizes: int | None
    ) -> None:
        super().__init__(**sizes)
        check_at_least("D3", 2, top_k=top_k)
        self.top_k, self.alpha, self.beta, self.gamma = top_k, alpha, beta, gamma

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        own = teacher @ teacher.T
        near = most_similar(own, self.top_k)
        t, x = own.gather(1, near), (student @ teacher.T).gather(1, near)
        features = row_norms((t[:, :1] - x[:, :1]).T).squeeze(0) / len(t)
        of_teacher, of_student = ((v[:, None, 1:] - v[:, 1:, None]).flatten(1) for v in (t, x))
        gaps = (of_student - of_teacher) / (0.1 + of_teacher.abs())
        order = (of_student.detach() * of_teacher).sign()
        wrong, right = (row_norms(torch.where(order == sign, gaps, 0)).mean() / (self.top_k - 1) for sign in (-1, 1))
        return self.alpha * features + self.beta * wrong + self.gamma * right
