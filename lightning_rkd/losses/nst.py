"""Neuron selectivity transfer (Huang and Wang 2017): distributions of the channels' activity over positions."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.functional.channels import flatten_channels, unit_channels
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_choice
from lightning_rkd.losses.parts.maps import match_sizes

Kernel = Literal["polynomial", "linear", "gaussian"]


def neuron_selectivity(student: Tensor, teacher: Tensor, *, kernel: Kernel = "polynomial") -> Tensor:
    """NST for one pair of maps; see :class:`NST`."""
    check_choice("NST", Kernel, kernel=kernel)
    s, t = match_sizes(student, teacher.detach(), "NST")
    s, t = unit_channels(flatten_channels(s, who="NST")), unit_channels(flatten_channels(t, who="NST"))
    if kernel == "linear":
        return (s.mean(1) - t.mean(1)).square().sum(1).mean()
    if kernel == "gaussian":
        return _gaussian(s, t)
    return _polynomial(s, t)


def _polynomial(s: Tensor, t: Tensor) -> Tensor:
    positions, channels = s.shape[2], max(s.shape[1], t.shape[1])
    if positions <= channels:  # the same number from P x P instead of C x C products
        gap = s.transpose(1, 2) @ s / s.shape[1] - t.transpose(1, 2) @ t / t.shape[1]
        return gap.square().sum((1, 2)).mean()
    tt, ss, st = ((a @ b.transpose(1, 2)).square().mean() for a, b in ((t, t), (s, s), (s, t)))
    return tt + ss - 2 * st


def _gaussian(s: Tensor, t: Tensor) -> Tensor:
    joint = torch.cat((s, t), dim=1)
    norms = joint.square().sum(2)
    squared = (norms[:, :, None] + norms[:, None] - 2 * joint @ joint.transpose(1, 2)).clamp(min=0)
    bandwidth = squared.detach().mean((1, 2), keepdim=True)
    k = torch.exp(-squared / (2 * torch.where(bandwidth > 0, bandwidth, 1)))
    c = s.shape[1]
    return k[:, :c, :c].mean() + k[:, c:, c:].mean() - 2 * k[:, :c, c:].mean()


class NST(RelationalLoss):
    r"""Matches the distribution of the channels' activity over positions, sample by sample.

    .. math::
        L = \sum_{\text{maps}} \frac{1}{N} \sum_n \Big[
        \frac{1}{C_t^2} \sum_{i,i'} k(\hat t_i, \hat t_{i'}) + \frac{1}{C_s^2} \sum_{j,j'} k(\hat s_j, \hat s_{j'})
        - \frac{2}{C_s C_t} \sum_{j,i} k(\hat s_j, \hat t_i) \Big]

    the squared maximum mean discrepancy between two sets of channels, where :math:`\hat s_j` is channel j of sample
    n's map as a vector of H W positions, divided by its norm. The kernels, with the weights :math:`\lambda` of the
    paper's :math:`\lambda / 2 \cdot L`, are

    - ``"polynomial"``, :math:`k(x, y) = (x^\top y)^2`, which compares Gram matrices of positions;
    - ``"linear"``, :math:`k(x, y) = x^\top y`, which compares mean maps, as attention transfer does;
    - ``"gaussian"``, :math:`k(x, y) = \exp(-\lVert x - y \rVert^2 / 2 \sigma^2)`. Its bandwidth is quoted from memory:
      :math:`\sigma^2` is the mean squared distance of the pairs. Here the pairs are all those of a sample's
      :math:`C_s + C_t` channels, and no gradient passes through :math:`\sigma`.

    The loss does not change when the maps of either network, or of any sample, are scaled.

    Departures: zero channels, common behind a ReLU, pass no gradient, where published code divides by 1e-12. The
    constant teacher-teacher term is kept, as in RepDistiller, so that a match gives 0; the authors' MXNet code drops
    it. Maps of different height or width are average-pooled to the smaller of the two, as RepDistiller does for square
    ones; nothing is published for tokens, so their numbers must agree.

    Shapes: lists of maps (N, C_s, H, W), (N, C_t, H, W), or of tokens (N, T, C_s), (N, T, C_t) -> scalar. Channels
    may differ.

    Args:
        kernel: ``"polynomial"``, ``"linear"`` or ``"gaussian"``.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Huang and Wang 2017, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv:1707.01219.

    Example:
        >>> student, teacher = torch.eye(2).view(1, 2, 1, 2), torch.ones(1, 1, 1, 2)
        >>> NST()([student], [teacher])
        tensor(0.5000)
    """

    reads = "feature_maps"
    gather = False
    invariances = frozenset({"scale", "row scale"})
    reference = Reference(
        "huang2017like",
        "read in code",
        source="HobbitLong/RepDistiller, distiller_zoo/NST.py; TuSimple/neuron-selectivity-transfer, "
        "symbol/transfer.py; the Gaussian kernel's bandwidth from memory",
        weight=50.0,
        weight_note="CIFAR-100, RepDistiller, the maps at the end of all stages, of VGG without the first "
        "(feature_maps=[1, 2, 3, 4]); ImageNet, the authors' configuration",
        result="CIFAR-100 resnet32x4 to resnet8x4: 73.30 (student alone 72.50), RepDistiller",
    )

    def __init__(self, kernel: Kernel = "polynomial", *, feature_maps: Sequence[int] | None = None) -> None:
        super().__init__()
        check_choice("NST", Kernel, kernel=kernel)
        self.kernel: Kernel = kernel
        self.feature_maps = feature_maps

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        terms = [neuron_selectivity(s, t, kernel=self.kernel) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(terms).sum()
