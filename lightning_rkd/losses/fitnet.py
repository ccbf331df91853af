"""FitNets (Romero et al. 2015): hints, feature maps of the teacher that the student learns to predict."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.functional.scales import limit_magnitude
from lightning_rkd.losses.base import Reference, RelationalLoss


class FitNetHint(RelationalLoss):
    r"""Predicts the teacher's feature maps from the student's by linear regressors.

    .. math::
        L = \sum_l \frac{1}{N C_l H_l W_l} \sum_{n,c,h,w} \big(r_l(S_l)_{nchw} - T_{lnchw}\big)^2

    :math:`r_l` is a 1 x 1 convolution from the student's channels to the teacher's, one for each pair of maps, trained
    with the student. The paper has one pair, from the middle of the networks.

    Departures: the mean, where the paper writes half the sum, as published comparisons do, whose weights assume it.
    Where the student's map is larger than the teacher's, so is the paper's kernel, and a valid convolution makes up
    the difference; here the sizes must agree, and then the paper's kernel is 1 x 1 too. Its regressor ends in the hint
    layer's non-linearity: pass ``relu=True`` where the teacher's map comes from behind a ReLU. RepDistiller's, to which
    weight and result belong, is ``norm=True, relu=True`` on one map; it has other kernels where sizes differ. The
    batch normalisation always takes the statistics of the batch, of all ranks, and keeps none. The paper trains on
    hints alone first; here the loss is one term among others. It aligns maps, and not the embeddings that are pooled
    from them, so ``aligns`` is ``False``.

    Shapes: lists of as many maps (N, C, H, W) or tokens (N, T, C), equal in both networks but for C -> scalar.

    Args:
        student_dim: Channels of each of the student's maps that are compared; inferred if left out.
        teacher_dim: Channels of each of the teacher's maps that are compared; inferred if left out.
        relu: Whether the regressors end in a ReLU.
        norm: Whether the convolution is followed by batch normalisation.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Romero, Ballas, Kahou, Chassang, Gatta and Bengio 2015, FitNets: Hints for Thin Deep Nets, arXiv:1412.6550.

    Example:
        >>> hint = FitNetHint((2,), (3,))
        >>> predicted = hint.regressors[0].bias.expand(4, 5, 5, 3).movedim(-1, 1)  # from a map of zeros
        >>> round(hint([torch.zeros(4, 2, 5, 5)], [predicted.detach() + 2]).item(), 4)
        4.0
    """

    reads = "feature_maps"
    gather = False
    reference = Reference(
        "romero2015fitnets",
        "read in code",
        source="adri-romsor/FitNets, costs/HintCost.py; HobbitLong/RepDistiller, distiller_zoo/FitNet.py",
        weight=100.0,
        weight_note="CIFAR-100, RepDistiller, norm=True, relu=True and the map of hint layer 2: feature_maps=[1] of a "
        "ResNet's three stages, [2] of a VGG's five",
        result="CIFAR-100 resnet32x4 to resnet8x4: 73.50 (student alone 72.50), RepDistiller",
    )
    regressors: nn.ModuleList
    norms: nn.ModuleList

    def __init__(
        self,
        student_dim: Sequence[int] | None = None,
        teacher_dim: Sequence[int] | None = None,
        *,
        relu: bool = False,
        norm: bool = False,
        feature_maps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.relu, self.norm, self.feature_maps = relu, norm, feature_maps
        self.gather = norm  # the statistics of a batch relate its samples
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: tuple[int, ...], teacher_dim: tuple[int, ...]) -> None:
        if len(student_dim) != len(teacher_dim):
            raise ValueError(
                f"FitNetHint: maps are compared in pairs, got channels {student_dim} of the student and {teacher_dim} "
                "of the teacher; name as many layers of either"
            )
        self.regressors = nn.ModuleList(
            nn.Linear(s, t, dtype=torch.float32) for s, t in zip(student_dim, teacher_dim, strict=True)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(t, track_running_stats=False, dtype=torch.float32) if self.norm else nn.Identity()
            for t in teacher_dim
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t = (x.movedim(1, -1) if x.ndim == 4 else x for x in (s, t))  # a linear layer is a 1 x 1 convolution
            if s.ndim > 4 or s.shape[:-1] != t.shape[:-1]:
                raise ValueError(
                    f"FitNetHint: maps[{i}] must be (N, C, H, W) or (N, T, C) and may differ in channels only, got "
                    f"{tuple(student[i].shape)} and {tuple(teacher[i].shape)}; tap layers of the same resolution"
                )
            predicted = self.regressors[i](self._centred(s)) if self.norm else self.regressors[i](s)
            predicted = self.norms[i](predicted.flatten(0, -2)).view_as(predicted)
            losses.append(F.mse_loss(predicted.relu() if self.relu else predicted, t))
        return torch.stack(losses).sum()

    def _centred(self, s: Tensor) -> Tensor:
        """Positions relative to the first, which batch normalisation does not notice and which saves digits."""
        if s[..., 0].numel() == 1:
            raise ValueError(
                "FitNetHint: batch normalisation needs more than one position, got one sample of one; use a larger "
                "batch (drop_last=True), a layer before pooling, or norm=False"
            )
        dims = tuple(range(s.ndim))
        return limit_magnitude(s - s.flatten(0, -2)[0].detach(), dims)
