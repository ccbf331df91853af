"""Contrastive representation distillation (Tian, Krishnan and Isola 2019): one partner among many negatives."""

import math

import torch
from torch import Tensor

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.losses.parts.memory_contrast import MemoryContrast


def log_mean_exp(dim: int, temperature: float) -> float:
    r"""Logarithm of the mean of :math:`e^{\langle v, m \rangle / \tau}` over all m of the unit sphere in ``dim`` >= 2.

    The angle :math:`\theta` between v and m has density :math:`\propto \sin^{d-2} \theta`.
    """
    theta = (torch.arange(2**16, dtype=torch.float64) + 0.5) * (math.pi / 2**16)
    density = (dim - 2) * theta.sin().log()
    return float(torch.logsumexp(density + theta.cos() / temperature, 0) - torch.logsumexp(density, 0))


class CRD(MemoryContrast):
    r"""Contrasts the student's row with the teacher's row of the same sample and K others, and the other way round.

    With :math:`v_i` the embedding projected onto the unit sphere by a trained linear layer, one per network, and
    :math:`m_j` the other network's memory, which holds a projected row for each of the M training samples:

    .. math::
        L = -\frac{1}{N} \sum_{v \in \{s, t\}} \sum_i \Big[ \log \frac{p_{ii}}{p_{ii} + K/M}
        + \sum_{j \in \mathrm{neg}(i)} \log \frac{K/M}{p_{ij} + K/M} \Big], \qquad
        p_{ij} = \frac{1}{Z} \exp \frac{\langle v_i, m_j \rangle}{\tau}

    After each training step the rows of the batch are updated in both memories:
    :math:`m_i \leftarrow \mu m_i + (1 - \mu) v_i`, normalised (:class:`~lightning_rkd.losses.parts.memory.MemoryBank`).

    Departures from the authors' code:

    - Given ``labels``, negatives are samples of other classes, as in their data loader; without, any other samples.
      They are drawn with replacement, as from the paper's product of marginals (their loader does so where a class has
      fewer than K negatives), so that data sets smaller than K work too. A sample counts as of another class until a
      batch has held it: its row is still a random point.
    - Z is theirs in expectation. They set it once, from the first batch, while all memories are random points, to M
      times the mean of the exponentials; that mean over all points of the sphere is known, and needs no first batch.
    - Scores come from products with the whole memory, N x M numbers, where they gather N x K x dim.

    Shapes: (N, D_s), (N, D_t), indices (N,), labels (N,) or (N, classes) -> scalar.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        num_samples: M, the size of the training set that ``indices`` count; inferred by the Lightning classes.
        dim: Width of the projections.
        negatives: K.
        temperature: :math:`\tau`.
        momentum: :math:`\mu`.
        seed: Of the memories' first rows and of the draws.

    Reference:
        Tian, Krishnan and Isola 2019, Contrastive Representation Distillation, arXiv:1910.10699.

    Example:
        >>> loss = CRD(num_samples=50)
        >>> value = loss(torch.randn(4, 8), torch.randn(4, 16), indices=torch.arange(4))
        >>> value.shape, int(loss.student_memory.updates)
        (torch.Size([]), 1)
    """

    reference = Reference(
        "tian2020contrastive",
        "read in code",
        source="HobbitLong/RepDistiller, crd/criterion.py and crd/memory.py",
        weight=0.8,
        weight_note="CIFAR-100, RepDistiller",
        result="CIFAR-100 resnet32x4 to resnet8x4: 75.51 (student alone 72.50), RepDistiller",
    )

    def log_mean(self) -> float:
        return log_mean_exp(self.dim, self.temperature)

    def similarities(self, memory: MemoryBank, features: Tensor, indices: Tensor, which: Tensor) -> Tensor:
        return memory.similarities(features, which)
