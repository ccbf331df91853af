"""Contrastive representation distillation (Tian, Krishnan and Isola 2019): the teacher's row among many others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.losses.parts.nce import nce
from lightning_rkd.losses.parts.projector import Projector


def log_mean_exp(dim: int, temperature: float) -> float:
    r"""Logarithm of the mean of :math:`e^{\langle v, m \rangle / \tau}` over all m of the unit sphere in ``dim`` >= 2.

    The angle :math:`\theta` between v and m has density :math:`\propto \sin^{d-2} \theta`.

    Example:
        >>> round(log_mean_exp(128, 0.07), 4)  # a normal distribution would give 1 / (2 d tau^2) = 0.7972
        0.7924
    """
    theta = (torch.arange(2**16, dtype=torch.float64) + 0.5) * (math.pi / 2**16)
    density = (dim - 2) * theta.sin().log()
    return float(torch.logsumexp(density + theta.cos() / temperature, 0) - torch.logsumexp(density, 0))


class CRD(RelationalLoss):
    r"""The student's row must find the teacher's row of the same sample among K others, and the other way round.

    With :math:`v_i` the embedding projected onto the unit sphere by a trained linear layer, one per network, and
    :math:`m_j` the other network's memory, which holds a projected row for each of the M training samples:

    .. math::
        L = -\frac{1}{N} \sum_{v \in \{s, t\}} \sum_i \Big[ \log \frac{p_{ii}}{p_{ii} + K/M}
        + \sum_{j \in \mathrm{neg}(i)} \log \frac{K/M}{p_{ij} + K/M} \Big], \qquad
        p_{ij} = \frac{1}{Z} \exp \frac{\langle v_i, m_j \rangle}{\tau}

    After each training step the rows of the batch move in both memories:
    :math:`m_i \leftarrow \mu m_i + (1 - \mu) v_i`, normalised (:class:`~lightning_rkd.losses.parts.memory.MemoryBank`).

    Departures from the authors' code:

    - Given ``labels``, negatives are samples of other classes, as in their data loader; without, any other samples.
      They are drawn with replacement, as the paper's product of marginals has it and their loader where a class has
      fewer than K negatives; data sets smaller than K so work too. A sample whose class no batch has told yet counts as
      another class: its row is still a random point.
    - Z is theirs in expectation. They set it once, from the first batch, while all memories are random points, to M
      times the mean of the exponentials; that mean over all points of the sphere is known, and needs no first batch.
    - Scores come from products with the whole memory, N x M numbers, where they gather N x K x dim.

    Shapes: (N, D_s), (N, D_t), indices (N,), labels (N,) or (N, classes) -> scalar.

    Args:
        student_dim: D_s; taken from the first batch where it is not given.
        teacher_dim: D_t; likewise.
        num_samples: M, the size of the training set that ``indices`` count; :class:`~lightning_rkd.DistillationModule`
            knows it.
        dim: Width of the projections.
        negatives: K.
        temperature: :math:`\tau`.
        momentum: :math:`\mu`.
        seed: Of the memories' first rows and of the draws.

    Raises:
        ValueError: An index outside the memory; no negatives, no positive temperature, a momentum outside [0, 1].

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
    student_projector: Projector
    teacher_projector: Projector
    student_memory: MemoryBank
    teacher_memory: MemoryBank

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        num_samples: int | None = None,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dim < 2 or negatives < 1 or temperature <= 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "CRD takes dim >= 2, negatives >= 1, temperature > 0 and a momentum from 0 to 1, "
                f"got dim={dim}, negatives={negatives}, temperature={temperature}, momentum={momentum}"
            )
        self.dim, self.negatives, self.temperature, self.momentum, self.seed = (
            dim, negatives, temperature, momentum, seed,
        )  # fmt: skip
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim, num_samples=num_samples)

    def build(self, student_dim: int, teacher_dim: int, num_samples: int) -> None:
        """Make projectors and memories."""
        self.student_projector = Projector(student_dim, self.dim)
        self.teacher_projector = Projector(teacher_dim, self.dim)
        self.student_memory = MemoryBank(num_samples, self.dim, seed=self.seed, name="CRD")
        self.teacher_memory = MemoryBank(num_samples, self.dim, seed=self.seed + 1, name="CRD")
        self._log_normaliser = math.log(num_samples) + log_mean_exp(self.dim, self.temperature)

    def forward(self, student: Tensor, teacher: Tensor, *, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss as a scalar; in training, the memories move on."""
        indices = self.student_memory.locate(indices)
        s, t = self.student_projector(student), self.teacher_projector(teacher)
        others = self.student_memory.draw(indices, self.negatives, labels)
        which = torch.cat([indices[:, None], others], dim=1)
        loss = self._nce(self.teacher_memory.similarities(s, which))
        loss = loss + self._nce(self.student_memory.similarities(t, which))
        if self.training:
            self.student_memory.update(indices, s, self.momentum, labels)
            self.teacher_memory.update(indices, t, self.momentum)
        return loss

    def _nce(self, similarities: Tensor) -> Tensor:
        return nce(similarities / self.temperature, self._log_normaliser, len(self.student_memory))
