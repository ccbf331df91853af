"""Relative similarity (Zhang, Li, Zeng and Wang 2024): the order of all similarities of a batch."""

import torch
from torch import Tensor

from lightning_rkd.functional.orders import order_hinge
from lightning_rkd.functional.scales import to_float64
from lightning_rkd.functional.similarities import cosine_similarities
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least


class RelativeSimilarity(RelationalLoss):
    r"""Hinge on every two similarities of a batch that the student does not order as the teacher does, by a margin.

    .. math::
        L = \frac{2}{M (M - 1)} \sum_{a < b} \max\big(0,\; \sigma_{ab} (S_b - S_a) + m\big), \qquad
        \sigma_{ab} = \begin{cases} +1 & T_b < T_a \\ -1 & \text{otherwise} \end{cases}

    S and T are the cosines of the M = N (N - 1) / 2 pairs of samples (i, j), i < j, numbered row by row. Where the
    teacher's similarities are equal, the student's later pair is asked to be the more similar one; the value then
    depends on the order of the samples, as that of the authors' code does.

    It is computed by counting, in O(M log M) time and O(M) memory with its gradient, where the sum has
    :math:`M^2 / 2` terms.

    Departure: cosines are taken in float64, so that rounding decides the order of fewer of them.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of at most two rows gives 0.

    Args:
        margin: m.

    Reference:
        Zhang, Li, Zeng and Wang 2024, Jasper and Stella: distillation of SOTA embedding models, arXiv:2412.19048.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.eye(3)[[0, 0, 1]]
        >>> RelativeSimilarity()(student, teacher)
        tensor(0.0050)
    """

    invariances = frozenset({"rotation", "scale", "row scale"})
    reference = Reference(
        "zhang2024jasper",
        "read in code",
        source="NLPJCL/RAG-Retrieval, rag_retrieval/train/embedding/model_distill.py",
        weight=20.0,
        weight_note="text embeddings, beside 10 on a cosine loss and 200 on the square error of similarities, averaged "
        "over the first columns of several numbers (Matryoshka), the authors' code",
    )

    def __init__(self, margin: float = 0.015) -> None:
        super().__init__()
        check_at_least("RelativeSimilarity", 0, margin=margin)
        self.margin = margin

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        i, j = torch.triu_indices(n, n, 1, device=student.device)
        s, t = (cosine_similarities(to_float64(x))[i, j] for x in (student, teacher))
        return order_hinge(s, t, margin=self.margin).to(student.dtype)
