"""Relaxed contrastive loss (Kim, Kim, Cho and Kwak 2021): the teacher's similarities as soft labels of pairs."""

import torch
from torch import Tensor

from lightning_rkd.functional.distances import pairwise_distances, squared_distances
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_positive


class RelaxedContrastive(RelationalLoss):
    r"""Pulls pairs of samples together by their similarity in the teacher, and pushes them apart otherwise.

    .. math::
        L = \frac{1}{N} \sum_{i \ne j} w_{ij} d_{ij}^2 + (1 - w_{ij}) \max(0, \delta - d_{ij})^2, \qquad
        d_{ij} = \frac{\lVert s_i - s_j \rVert}{\frac{1}{N} \sum_m \lVert s_i - s_m \rVert}, \quad
        w_{ij} = e^{-\lVert \hat t_i - \hat t_j \rVert^2 / \sigma}

    The teacher's rows are normalised, the student's are not. The mean distance of a sample runs over all N samples,
    itself included, and is part of the graph. The loss does not change when either embedding is rotated or scaled.

    Departures: distances are exact (float64, centred) where the authors' are clamped at 1e-6; duplicates have distance
    0, count as all pairs do, and pass no gradient.

    Shapes: (N, D_s), (N, D_t) -> scalar. A batch of one row gives 0.

    Args:
        sigma: Bandwidth of the teacher's similarity; 1 in the paper.
        delta: Margin, in mean distances of the sample; 1 in the paper.

    Reference:
        Kim, Kim, Cho and Kwak 2021, Embedding Transfer with Label Relaxation for Improved Metric Learning,
        arXiv:2103.14908. There it is the only loss, with several augmented views of each image in a batch.

    Example:
        >>> student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
        >>> RelaxedContrastive()(student, teacher)
        tensor(0.6047)
    """

    reference = Reference(
        "kim2021embedding",
        "read in code",
        source="tjddus9597/LabelRelaxation-CVPR21, code/Relaxed_losses.py",
        weight=1.0,
        weight_note="metric learning, the only loss",
        result="R@1 on CUB/Cars/SOP, BN-Inception-512 to itself: 72.1/89.6/79.8 (teacher 69.1/86.4/79.2)",
    )
    invariances = frozenset({"rotation", "scale"})

    def __init__(self, sigma: float = 1.0, delta: float = 1.0) -> None:
        super().__init__()
        check_positive("RelaxedContrastive", sigma=sigma, delta=delta)
        self.sigma, self.delta = sigma, delta

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        d = pairwise_distances(student)
        mean = d.mean(1, keepdim=True)
        d = d / torch.where(mean > 0, mean, 1)
        alike = torch.exp(-squared_distances(unit_rows(teacher)) / self.sigma)
        pull, push = alike * d.square(), (1 - alike) * (self.delta - d).relu().square()
        # on the diagonal, which the sum leaves out, alike is 1 and d is 0
        return ((pull + push).sum() / len(student)).to(student.dtype)
