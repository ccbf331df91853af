"""DarkRank (Chen, Wang and Zhang 2018): the ranking of each sample's nearest neighbours."""

from torch import Tensor

from lightning_rkd.functional.distances import pairwise_distances
from lightning_rkd.functional.ranks import log_probability_of_order, nearest_samples, permutations
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive

_LONGEST = 7  # lists have 5,040 orders, each of which is scored


class HardDarkRank(RelationalLoss):
    r"""Likelihood of the teacher's ranking of each sample's nearest neighbours (hard transfer).

    .. math::
        L = -\frac{1}{N} \sum_i \sum_{l=1}^{L} \Big( S_{i \pi_i(l)} - \log \sum_{m \ge l} e^{S_{i \pi_i(m)}} \Big),
        \qquad S_{ij} = -\alpha \lVert s_i - s_j \rVert^\beta

    where :math:`\pi_i` lists the L nearest samples of sample i to the teacher, nearest first: the negative
    log-likelihood of the teacher's ranking. The loss does not change when either embedding is moved or rotated. Scores
    grow with the third power of distances, so the embeddings of both networks should have unit norm: with a student
    that is not normalised published results are much worse.

    Departures from the code of Park et al. (Relational Knowledge Distillation), which published weights come from: a
    sample is never in its own list, where theirs drops whichever of several duplicates comes first; distances are exact
    and duplicates pass no gradient. DarkRank's own code ranks the whole batch instead of L samples, and only from its
    first half, which its sampler fills with pairs of a class.

    Shapes: (N, D_s), (N, D_t) -> scalar. Lists are as long as the batch allows; up to two rows give 0.

    Args:
        alpha: Factor of the scores; 3 by default in published code, 2 in its training script.
        beta: Power of the distances in the scores; 3 in published code, at least 1.
        length: How many nearest samples are ranked; 4 in published code.

    Reference:
        Chen, Wang and Zhang 2018, DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer,
        arXiv:1707.01220.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [1.5]])
        >>> HardDarkRank()(student, teacher)  # the middle sample's neighbours are in the wrong order
        tensor(7.)
    """

    reference = Reference(
        "chen2018darkrank",
        "read in code",
        source="lenscloth/RKD, metric/loss.py",
        weight=1.0,
        weight_note="metric learning with unit embeddings, beside a triplet loss, LabelRelaxation",
        result="R@1 on CUB/Cars/SOP, BN-Inception-512 to itself: 66.7/84.0/75.7 (teacher 69.1/86.4/79.2), "
        "LabelRelaxation",
    )
    invariances = frozenset({"translation", "rotation"})

    def __init__(self, alpha: float = 3.0, beta: float = 3.0, length: int = 4) -> None:
        super().__init__()
        check_positive(self.display_name, alpha=alpha)
        check_at_least(self.display_name, 1, beta=beta, length=length)  # beta: or duplicates have infinite gradients
        self.alpha, self.beta, self.length = alpha, beta, length

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        scores, _ = self._scores(student, teacher)
        return -log_probability_of_order(scores).mean().to(student.dtype)

    def _scores(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, L) of each sample's nearest neighbours in the teacher, nearest first, in student and teacher."""
        s, t = pairwise_distances(student), pairwise_distances(teacher)
        near = nearest_samples(t, self.length)
        return -self.alpha * s.gather(1, near).pow(self.beta), -self.alpha * t.gather(1, near).pow(self.beta)


class SoftDarkRank(HardDarkRank):
    r"""Divergence between the probabilities of all rankings of each sample's nearest neighbours (soft transfer).

    .. math::
        L = \frac{1}{N} \sum_i \sum_{\pi} P_t(\pi \mid i) \log \frac{P_t(\pi \mid i)}{P_s(\pi \mid i)}, \qquad
        \log P(\pi \mid i) = \sum_{l=1}^{L} \Big( S_{i \pi(l)} - \log \sum_{m \ge l} e^{S_{i \pi(m)}} \Big)

    over all L! orders of the L nearest samples of sample i to the teacher, with the scores :math:`S` of
    :class:`HardDarkRank`, whose notes on norms hold here too.

    Departures from the authors' code: theirs leaves the teacher's entropy, a constant, in the loss, takes only the
    first half of the batch as queries, which its sampler fills with pairs of a class, and its hand-written gradient
    moves the listed samples but not the query; its scores :math:`-(3.5\, d^2)^2` are ``alpha=12.25, beta=4`` here, and
    its weight of 16 is one of 2 beside a mean over the batch, by whose size, 8, its optimizer divides all gradients.

    Shapes: (N, D_s), (N, D_t) -> scalar. Lists are as long as the batch allows; up to two rows give 0. Time and memory
    grow with N L!.

    Args:
        alpha: Factor of the scores.
        beta: Power of the distances in the scores, at least 1.
        length: How many nearest samples are ranked; 4 in the authors' code, at most 7.

    Reference:
        Chen, Wang and Zhang 2018, DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer,
        arXiv:1707.01220.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [1.5]])
        >>> SoftDarkRank()(student, teacher)
        tensor(6.4644)
    """

    reference = Reference(
        "chen2018darkrank",
        "read in code",
        source="TuSimple/DarkRank, PYOP/listnet_loss.py",
        weight=2.0,
        weight_note="Market-1501 with unit embeddings, alpha=12.25 and beta=4; the authors' 16 over their batch of 8. "
        "It belongs to their hand-written gradient, whose cosine with this loss's is 0.83 to 0.86",
    )

    def __init__(self, alpha: float = 3.0, beta: float = 3.0, length: int = 4) -> None:
        super().__init__(alpha, beta, length)
        if length > _LONGEST:
            raise ValueError(
                f"SoftDarkRank: length must be at most {_LONGEST}, since all orders are scored, got {length}; "
                "HardDarkRank takes longer lists"
            )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        both = self._scores(student, teacher)
        orders = permutations(both[0].shape[1], student.device)
        log_q, log_p = (log_probability_of_order(scores[:, orders]) for scores in both)  # (N, length!)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean().to(student.dtype)
