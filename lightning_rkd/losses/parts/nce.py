"""Noise-contrastive estimation: classification of rows as partner or noise."""

import math

from torch import Tensor
from torch.nn import functional as F

_EPS = 1e-7


def nce(scores: Tensor, log_normaliser: float, num_samples: int) -> Tensor:
    r"""Binary classification of one partner against K rows of noise, summed over the noise, mean over the rows.

    .. math::
        L = -\frac{1}{R} \sum_{r} \Big[ \log \frac{p_{r0}}{p_{r0} + K/M + \epsilon}
        + \sum_{k=1}^{K} \log \frac{K/M}{p_{rk} + K/M + \epsilon} \Big], \qquad p_{rk} = \frac{e^{s_{rk}}}{Z}

    Computed from the logarithms of p, which overflow at no temperature; :math:`\epsilon` is the authors' 1e-7.

    Shapes: similarities divided by the temperature (R, 1 + K), the partner's first -> scalar. M is ``num_samples``.

    Reference:
        Tian, Krishnan and Isola 2019, Contrastive Representation Distillation, arXiv:1910.10699, eq. 18.
    """
    noise = (scores.shape[1] - 1) / num_samples
    odds = scores - log_normaliser - math.log(noise + _EPS)  # log of p / (K/M + eps)
    partner, others = F.logsigmoid(odds[:, :1]), F.logsigmoid(-odds[:, 1:]) + math.log(noise / (noise + _EPS))
    return -(partner.sum() + others.sum()) / len(scores)
