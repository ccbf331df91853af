"""Inter-channel correlation (Liu, Huang, Lin, Xie, Wang, Chang and Liang 2021): similarities of a map's channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_rkd.functional.channels import flatten_channels, unit_channels
from lightning_rkd.functional.scales import limit_magnitude
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.maps import gram_matrices


def inter_channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """ICKD for one pair of maps with equally many channels; see :class:`ICKD`."""
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"ICKD compares equally many channels of the same samples, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; bring the student to the teacher's channels first"
        )
    s, t = (unit_channels(gram_matrices(x)) for x in (student, teacher.detach()))
    return (s - t).square().sum() / (s.shape[0] * s.shape[1])


class ICKD(RelationalLoss):
    r"""Compares the similarities between the channels of a map, sample by sample.

    .. math::
        L = \sum_{\text{maps}} \frac{1}{N C} \sum_n \big\lVert \hat G(\phi(S_n)) - \hat G(T_n) \big\rVert_F^2,
        \qquad \hat G(X)_{i} = \frac{(X X^\top)_i}{\lVert (X X^\top)_i \rVert_2}

    with a map as C channels times H W positions, so that :math:`\hat G` is C x C with unit rows. The learnt
    :math:`\phi`, a 1 x 1 convolution without bias and a batch normalisation, gives the student the teacher's C
    channels. As Gram matrices are compared, the two maps may differ in height and width. The loss hardly
    changes when an input is scaled: only the 1e-5 in the denominator of the batch normalisation is not.

    This is the loss of the authors' CIFAR code. Their ImageNet code, and torchdistill after it, divides by N once more
    and uses a 3 x 3 convolution: its weight of 500 at 256 images corresponds to a weight of 500 / 256 here.

    Departures: batch normalisation always takes the statistics of the batch, which is what the authors' code does in
    training, and keeps no running ones, which would be unused. As it relates samples to one another, the maps of
    all ranks are gathered. A channel that is zero everywhere passes no gradient through the normalisation of its row,
    where theirs divides by 1e-12. Their second learnt map, for the teacher, is never used and is left out. The
    paper's variant for dense prediction, which correlates the channels of grid cells, is not here.

    Shapes: lists of maps (N, C_s, H, W), (N, C_t, H', W'), or of tokens (N, T, C_s), (N, T', C_t) -> scalar.

    Args:
        student_dim: Channels of each of the student's maps that are compared; inferred if left out.
        teacher_dim: Channels of each of the teacher's maps that are compared; inferred if left out.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.

    Reference:
        Liu, Huang, Lin, Xie, Wang, Chang and Liang 2021, Exploring Inter-Channel Correlation for Diversity-preserved
        Knowledge Distillation, arXiv:2202.03680.

    Example:
        >>> loss = ICKD(student_dim=[1], teacher_dim=[2])
        >>> loss([torch.tensor([[[[1.0, 2.0]]]])], [torch.eye(2).view(1, 2, 1, 2)]).shape
        torch.Size([])
        >>> inter_channel_correlation(torch.eye(2)[None], torch.ones(1, 2, 1))  # two channels that differ, or agree
        tensor(0.5858)
    """

    reads = "feature_maps"
    reference = Reference(
        "liu2021exploring",
        "read in code",
        source="ADLab-AutoDrive/ICKD, Cifar100/distiller_zoo/ICKD.py",
        weight=2.5,
        weight_note="CIFAR-100, the last map before pooling (feature_maps=[-1]), the authors' README; one of their "
        "scripts has 4",
        result="CIFAR-100 resnet32x4 to resnet8x4: 75.25 (student alone 72.50), the authors' README",
    )
    embed: nn.ModuleList

    def __init__(
        self,
        student_dim: Sequence[int] | None = None,
        teacher_dim: Sequence[int] | None = None,
        *,
        feature_maps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.feature_maps = feature_maps
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: tuple[int, ...], teacher_dim: tuple[int, ...]) -> None:
        if len(student_dim) != len(teacher_dim):
            raise ValueError(f"ICKD: {len(student_dim)} maps of the student do not go with {len(teacher_dim)}")
        self.embed = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(s, t, 1, bias=False, dtype=torch.float32),  # over positions in one row: a 1 x 1 convolution
                nn.BatchNorm1d(t, track_running_stats=False, dtype=torch.float32),
            )
            for s, t in zip(student_dim, teacher_dim, strict=True)
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        terms = []
        for embed, s, t in zip(self.embed, student, teacher, strict=True):
            if s.ndim not in (3, 4) or t.ndim not in (3, 4):  # a vector's channels have no positions to correlate over
                raise ValueError(
                    "ICKD: student and teacher must give maps (N, C, H, W) or tokens (N, T, C), "
                    f"got {tuple(s.shape)} and {tuple(t.shape)}; tap layers before pooling"
                )
            channels = flatten_channels(s, who="ICKD")
            if channels.shape[0] * channels.shape[2] == 1:
                raise ValueError(
                    f"ICKD: batch normalisation needs more than one position, got a map {tuple(s.shape)}; use a "
                    "larger batch (drop_last=True) or a layer before pooling"
                )
            # the batch normalisation removes what all positions share, which would cost digits in the convolution
            channels = limit_magnitude(channels - channels[:1, :, :1].detach(), (0, 1, 2))
            terms.append(inter_channel_correlation(embed(channels), flatten_channels(t, who="ICKD")))
        return torch.stack(terms).sum()
