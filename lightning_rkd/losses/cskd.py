"""CSKD (Ham, Kim, Lee, Lee and Kim 2023): cosine similarity of the probabilities of each class over the batch."""

import torch
from torch import Tensor

from lightning_rkd.functional.scales import far_above_rounding, to_float64
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_logits, check_positive, standardise_rows

_REFERENCE = Reference(
    "ham2023cosine",
    "read in code",
    source="a public implementation on top of multi-level logit distillation: llieeai/lud, "
    "mdistiller/distillers/CSKD.py",
    weight=1.0,
    weight_note="that code's default",
)


def class_similarity(student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0) -> Tensor:
    """One minus the mean cosine of the classes; see :class:`ClassSimilarityKD`."""
    s, t = (_directions(z / temperature) for z in (student, teacher.detach()))
    return 1 - (s * t).sum(1).mean()


def _cosines(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit_rows(student.softmax(1)) * unit_rows(teacher.softmax(1))).sum(1, keepdim=True)


def _directions(logits: Tensor) -> Tensor:
    """Unit vectors of the classes' probabilities, (K, N), also for a class whose probabilities underflow."""
    p = logits.softmax(1)
    if far_above_rounding(p.amax(0)):
        return unit_rows(p.T)
    log_p = to_float64(logits).log_softmax(1).T  # beside large logits float32 would lose their logarithms
    return unit_rows((log_p - log_p.detach().amax(1, keepdim=True)).exp()).to(logits.dtype)


def cosine_temperatures(student: Tensor, teacher: Tensor, *, low: float = 2.0, high: float = 6.0) -> Tensor:
    """Temperature of each sample, lower the more the two networks agree; see :class:`CosineTemperatureKD`.

    Shapes: logits (N, K), (N, K) -> (N, 1), without a graph. All are ``low`` where the networks agree equally on all
    samples.
    """
    with torch.no_grad():
        cosines = _cosines(student, teacher)
        if not far_above_rounding(cosines.max() - cosines.min()):  # or rounding would be spread over all temperatures
            cosines = _cosines(to_float64(student), to_float64(teacher))
        most, spread = cosines.max(), cosines.max() - cosines.min()
        temperatures: Tensor = low + (high - low) * (most - cosines) / torch.where(spread > 0, spread, 1)
        return temperatures.to(student.dtype)


class ClassSimilarityKD(RelationalLoss):
    r"""Aligns the vector of a class's probabilities over the batch with the teacher's.

    .. math::
        L = \alpha T^2 \Big(1 - \frac{1}{K} \sum_k \cos(p^s_{\cdot k}, p^t_{\cdot k})\Big), \qquad p = \sigma(z / T)

    :math:`\sigma` is the softmax over classes; the cosine is that of columns, vectors with one entry per sample. Their
    norms do not count, so the student need not be as confident as its teacher. The loss does not change when a constant
    is added to all logits of a sample.

    Departures: the code, from which this is taken without the body of the paper, takes the absolute value of the
    cosine, without effect since probabilities are not negative, and adds 1e-8 to its denominator, which lowers the
    similarity of rare classes; here nothing is added.

    The paper's method is this loss plus :class:`CosineTemperatureKD`, on weakly and on strongly augmented images. The
    code adds two terms of multi-level logit distillation (Gram matrices over classes and over samples), which are not
    part of this loss, and halves what the weakly augmented images give (it multiplies by the share of rows on which the
    teacher is less sure than the median).

    Shapes: (N, K), (N, K) -> scalar. One row gives 0.

    Args:
        temperature: T.
        scale: :math:`\alpha`.
        standardise: Take the z-score of each row of logits, in both networks, before the temperature
            (:func:`~lightning_rkd.losses.parts.checks.standardise_rows`).

    Reference:
        Ham, Kim, Lee, Lee and Kim 2023, Cosine Similarity Knowledge Distillation for Individual Class Information
        Transfer, arXiv:2311.14307.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> ClassSimilarityKD(temperature=1.0)(logits.flip(0), logits)
        tensor(1.4684)
    """

    reads = "logits"
    invariances = frozenset({"row shift"})
    reference = _REFERENCE

    def __init__(self, temperature: float = 4.0, scale: float = 2.0, *, standardise: bool = False) -> None:
        super().__init__()
        check_positive("ClassSimilarityKD", temperature=temperature, scale=scale)
        self.temperature, self.scale, self.standardise = temperature, scale, standardise

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "ClassSimilarityKD", dims=(2,))
        if self.standardise:
            student, teacher = standardise_rows(student), standardise_rows(teacher)
        factor = self.scale * self.temperature**2
        return factor * class_similarity(student, teacher, temperature=self.temperature)


class CosineTemperatureKD(RelationalLoss):
    r"""Class similarity with a temperature per sample, low where student and teacher agree (CSWT).

    .. math::
        L = \alpha \bar T^2 \Big(1 - \frac{1}{K} \sum_k \cos(p^s_{\cdot k}, p^t_{\cdot k})\Big), \qquad
        p_i = \sigma(z_i / T_i), \quad
        T_i = T_{lo} + (T_{hi} - T_{lo}) \frac{\max_j c_j - c_i}{\max_j c_j - \min_j c_j}

    :math:`c_i` is the cosine of the two networks' probabilities for sample i at temperature 1, :math:`\bar T` the mean
    of the temperatures. No gradient passes through the temperatures. The loss does not change when a constant is
    added to all logits of a sample.

    Departures, beside those of :class:`ClassSimilarityKD`: where all cosines are equal, as with one row, the code
    divides 0 by 0; here all temperatures are the low one. The code takes the temperatures of strongly augmented images
    from the weakly augmented ones; this loss takes them from the logits that it is given.

    Shapes: (N, K), (N, K) -> scalar. One row gives 0.

    Args:
        low: :math:`T_{lo}`.
        high: :math:`T_{hi}`.
        scale: :math:`\alpha`.
        standardise: Take the z-score of each row of logits, in both networks, before the temperatures are found
            (:func:`~lightning_rkd.losses.parts.checks.standardise_rows`).

    Reference:
        Ham, Kim, Lee, Lee and Kim 2023, Cosine Similarity Knowledge Distillation for Individual Class Information
        Transfer, arXiv:2311.14307.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> CosineTemperatureKD()(student, teacher)
        tensor(0.3456)
    """

    reads = "logits"
    invariances = frozenset({"row shift"})
    reference = _REFERENCE

    def __init__(self, low: float = 2.0, high: float = 6.0, scale: float = 2.0, *, standardise: bool = False) -> None:
        super().__init__()
        check_positive("CosineTemperatureKD", low=low, high=high, scale=scale)
        if low > high:
            raise ValueError(f"CosineTemperatureKD: low must not exceed high, got low={low} and high={high}")
        self.low, self.high, self.scale, self.standardise = low, high, scale, standardise

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, "CosineTemperatureKD", dims=(2,))
        if self.standardise:
            student, teacher = standardise_rows(student), standardise_rows(teacher)
        temperatures = cosine_temperatures(student, teacher, low=self.low, high=self.high)
        return self.scale * temperatures.mean() ** 2 * class_similarity(student, teacher, temperature=temperatures)
