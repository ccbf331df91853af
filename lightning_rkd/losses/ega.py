"""Embedding graph alignment (Ma, Chen and Akata 2022): correlations between the rows of student and teacher."""

import torch
from torch import Tensor

from lightning_rkd.functional.scales import centre_columns
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss


class EGA(AnchoredLoss):
    r"""Matches nodes, the embeddings of student and teacher, and edges, the correlations between samples.

    .. math::
        L = w_n \lVert \rho(s, t) - I \rVert_F + w_e \lVert \rho(t, t) - \rho(s, s) \rVert_F

    with the Pearson correlations :math:`\rho(a, b)_{ij}` between rows :math:`a_i` and :math:`b_j`, taken over their
    entries. The norms are not squared and grow with N. The first term pulls each row of the student to the teacher's
    row of the same sample and away from the others. It leaves a constant in all entries of a row free, so that it does
    not bring the student into the teacher's space unless rows are centred before they are compared.

    A row with equal entries has correlation 0 and passes no gradient, where the authors' code gives NaN.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows;
    the authors have one of the teacher's as well, trained by cross-entropy.

    Shapes: (N, D_s), (N, D_t) -> scalar.

    Args:
        node_weight: :math:`w_n`.
        edge_weight: :math:`w_e`.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Ma, Chen and Akata 2022, Distilling Knowledge from Self-Supervised Teacher by Embedding Graph Alignment,
        arXiv:2211.13264.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> EGA()(student, teacher)
        tensor(3.2980)
    """

    aligns = False
    reference = Reference(
        "ma2022distilling",
        "read in code",
        source="yccm/EGA, distiller_zoo/EGA.py; giakoumoglou/distillers has the same",
        weight=1.0,
        weight_note="CIFAR-100, CLIP ViT-B/32 to resnet8x4 beside cross-entropy, the authors' repository; "
        "node_weight=0.8 for CLIP RN101",
    )

    def __init__(self, node_weight: float = 1.0, edge_weight: float = 0.3, **sizes: int | None) -> None:
        super().__init__(**sizes)
        self.node_weight, self.edge_weight = node_weight, edge_weight

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (unit_rows(centre_columns(x.T).T) for x in (student, teacher))
        nodes = s @ t.T - torch.eye(len(s), dtype=s.dtype, device=s.device)
        node, edge = (torch.linalg.vector_norm(x) for x in (nodes, t @ t.T - s @ s.T))
        value: Tensor = self.node_weight * node + self.edge_weight * edge
        return value
