"""Attention transfer (Zagoruyko and Komodakis 2017): the student attends to the places that the teacher attends to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rkd.functional.scales import power_of_two, squares_in_range
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least
from lightning_rkd.losses.parts.maps import match_sizes


def attention_map(features: Tensor, *, power: float = 2.0) -> Tensor:
    r"""Attention of a feature map: the strength of the response at each place, with unit norm per sample.

    Shapes: (N, C, H, W) -> (N, H W); tokens (N, T, C) -> (N, T). Zeros where a map is zero.
    """
    strength = _strength(features, power)
    if not squares_in_range(torch.linalg.vector_norm(strength.detach(), dim=1), features):
        strength = _strength(features / power_of_two(features, tuple(range(1, features.ndim))), power)
    return unit_rows(strength)


def _strength(features: Tensor, power: float) -> Tensor:
    return features.abs().pow(power).mean(1 if features.ndim == 4 else 2).flatten(1)


class AttentionTransfer(RelationalLoss):
    r"""Matches the places of an image at which the features of student and teacher are strong.

    .. math::
        L = \sum_l \frac{1}{N P_l} \sum_n \big\lVert \hat Q^s_{ln} - \hat Q^t_{ln} \big\rVert_2^2, \qquad
        Q_n = \mathrm{vec} \sum_c |A_{nc}|^p, \quad \hat Q = Q / \lVert Q \rVert_2

    :math:`P_l` is the number of places of map l. Channels are summed out, so their numbers may differ. The loss does
    not change when the map of a sample is multiplied by a positive number, in either network.

    Departures: the paper writes the norm of the difference; the authors' code, which this follows and on which
    published weights rest, the mean of its squares. Maps of different spatial size are brought to the smaller one by
    adaptive average pooling, as RepDistiller does; the authors' code has none. Tokens are an extension. A map of zeros
    has no attention and passes no gradient.

    Shapes: lists of as many maps (N, C, H, W) or tokens (N, T, C) from both networks -> scalar.

    Args:
        power: p, at least 1.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Zagoruyko and Komodakis 2017, Paying More Attention to Attention: Improving the Performance of Convolutional
        Neural Networks via Attention Transfer, arXiv:1612.03928.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
        >>> AttentionTransfer()([student], [teacher])
        tensor(1.)
    """

    reads = "feature_maps"
    gather = False
    invariances = frozenset({"scale", "row scale"})
    reference = Reference(
        "zagoruyko2017paying",
        "read in code",
        source="szagoruyko/attention-transfer, utils.py; HobbitLong/RepDistiller, distiller_zoo/AT.py",
        weight=1000.0,
        weight_note="CIFAR-100, RepDistiller, the maps at the end of all stages, of VGG without the first "
        "(feature_maps=[1, 2, 3, 4])",
        result="CIFAR-100 resnet32x4 to resnet8x4: 73.44 (student alone 72.50), RepDistiller",
    )

    def __init__(self, power: float = 2.0, *, feature_maps: Sequence[int] | None = None) -> None:
        super().__init__()
        check_at_least("AttentionTransfer", 1, power=power)
        self.power, self.feature_maps = power, feature_maps

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t = match_sizes(s, t, f"AttentionTransfer, map {i}")
            losses.append((attention_map(s, power=self.power) - attention_map(t, power=self.power)).square().mean())
        return torch.stack(losses).sum()
