"""Complementary relation contrastive distillation (Zhu et al. 2021): relations to anchors, contrasted with noise."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.memory import MemoryBank, generator
from lightning_rkd.losses.parts.memory_contrast import MemoryContrast

_SHIFT = 1e-6


def relation_similarities(features: Tensor, memory: Tensor, anchors: Tensor, same: Tensor) -> Tensor:
    r"""Cosines between the relation of each feature and those of its memory rows, to every anchor.

    .. math::
        c_{iak} = \langle r(v_i, a), r(m_{ik}, a) \rangle, \qquad
        r(x, a) = \frac{x - a + 10^{-6}}{\lVert x - a + 10^{-6} \rVert_2}

    The relations of the memory rows, N x A x K x D numbers, are never formed: with :math:`r = r(v_i, a)`, the numerator
    is :math:`\langle r, m \rangle - \langle r, a - 10^{-6} \rangle`, in float64 where the device has it.

    Shapes: features v (N, D), memory m (N, K, D), anchors a (A, D), same (N, A, K), true where the memory row is the
    anchor, and only the 1e-6 would be left -> (N, A, K). Gradients pass through the features alone.
    """
    exact = torch.float32 if features.device.type == "mps" else torch.float64
    rows, origins = memory.to(exact), anchors.to(exact) - _SHIFT
    relations = F.normalize(features.to(exact)[:, None] - origins, dim=2)
    lengths = rows.square().sum(2)[:, None] + origins.square().sum(1)[:, None] - 2 * origins @ rows.mT
    lengths = lengths.clamp_(min=1e-24).sqrt_()
    numerators = relations @ rows.mT - (relations * origins).sum(2, keepdim=True)
    to_itself = relations.sum(2, keepdim=True) / features.shape[1] ** 0.5  # r(a, a) is the constant vector
    return torch.where(same, to_itself, numerators / lengths).to(features.dtype)


@cache
def log_mean_exp(dim: int, temperature: float) -> float:
    r"""Logarithm of the mean of :math:`e^{c / \tau}` where all three points of c are random, from 16,384 draws."""
    points = torch.randn(3, 2**14, dim, generator=generator(0, 0), dtype=torch.float32)
    v, m, a = F.normalize(points, dim=2)
    cosines = F.cosine_similarity(v - a, m - a, dim=1).double()
    return float(torch.logsumexp(cosines / temperature, 0)) - math.log(len(cosines))


class CRCD(MemoryContrast):
    r"""Contrasts the direction from an anchor to the student's row with that to the teacher's row, and to K others.

    Rows are projected onto the unit sphere by a trained linear layer per network, and kept in a memory per network.
    With :math:`r(x, a)` the unit vector from an anchor to a row (:func:`relation_similarities`), the relation of the
    student's row :math:`s_i` to every anchor must match that of the memory's row for the same sample, and none of K
    others:

    .. math::
        L_s = -\frac{1}{N^2} \sum_{i, a} \Big[ \log \frac{p_{iai}}{p_{iai} + K/M}
        + \sum_{j \in \mathrm{neg}(i)} \log \frac{K/M}{p_{iaj} + K/M} \Big], \qquad
        p_{iaj} = \frac{1}{Z} \exp \frac{\langle r(s_i, a), r(m_j, a) \rangle}{\tau}

    where m is the teacher's memory and the anchors a are its N rows of the batch's samples. :math:`L_t` is the same
    with the networks exchanged, and trains the teacher's projection; :math:`L = L_s + L_t`. After each training step
    the rows of the batch are updated in both memories (:class:`~lightning_rkd.losses.parts.memory.MemoryBank`).

    This is the paper's feature relation. Its gradient relation is left out: the authors' code (helper/loops.py,
    ``get_gradnh_loss``), in a script that they call unchecked, multiplies the soft-target loss by it.

    Departures from the published code, which its authors call a partial reimplementation of the paper's:

    - Given ``labels``, negatives are samples of other classes, as in their data loader; without, any other samples;
      drawn with replacement.
    - Z is theirs in expectation: they set it once, from the first batch, while all memories are random points, to M
      times the mean of the exponentials. Here that mean is taken over triples of random points.
    - As there, a sample is among its own anchors; its relation to itself in the memory is the constant vector.
    - They form all N x N x K relations of the memories, 1 GB a batch of 64; here only their cosines are.

    Shapes: (N, D_s), (N, D_t), indices (N,), labels (N,) or (N, classes) -> scalar.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        num_samples: M, the size of the training set that ``indices`` count; inferred by the Lightning classes.
        dim: Width of the projections.
        negatives: K.
        temperature: :math:`\tau`.
        momentum: Of the memories.
        seed: Of the memories' first rows and of the draws.

    Reference:
        Zhu et al. 2021, Complementary Relation Contrastive Distillation, arXiv:2103.16367.

    Example:
        >>> loss = CRCD(num_samples=50)
        >>> value = loss(torch.randn(4, 8), torch.randn(4, 16), indices=torch.arange(4))
        >>> value.shape, int(loss.student_memory.updates)
        (torch.Size([]), 1)
    """

    reference = Reference(
        "zhu2021complementary",
        "read in code",
        source="Lechatelia/CRCD, crcd/criterion.py and crcd/memory.py; the feature relation only",
        weight=1.0,
        weight_note="CIFAR-100, the authors' script; 0 in the last 10 of 250 epochs",
    )

    def __init__(self, *args: int | None, negatives: int = 500, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, negatives=negatives, temperature=temperature, **kwargs)

    def log_mean(self) -> float:
        return log_mean_exp(self.dim, self.temperature)

    def similarities(self, memory: MemoryBank, features: Tensor, indices: Tensor, which: Tensor) -> Tensor:
        """Similarities of relations to every anchor, one row for each row and anchor."""
        same = which[:, None] == indices[:, None]
        return relation_similarities(features, memory.rows[which], memory.rows[indices], same).flatten(0, 1)
