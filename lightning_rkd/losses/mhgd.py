"""Graph-based knowledge distillation by a multi-head attention network (Lee and Song 2019)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_rkd.functional.channels import flatten_positions
from lightning_rkd.functional.singular import align_vectors, right_singular_vectors
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts import attention_graph as stage1
from lightning_rkd.losses.parts.checks import check_choice

Reduction = Literal["official", "mean"]
_CANDIDATES = 4  # singular vectors of the student, of which one is compared


def graph_divergence(student: Tensor, teacher: Tensor, *, reduction: Reduction = "official") -> Tensor:
    """The divergence of two attention graphs; see :class:`MHGD`."""
    s, t = (torch.log_softmax(logits.tanh(), -1) for logits in (student, teacher))
    divergence = s.exp() * (s - t)
    return divergence.sum() if reduction == "official" else divergence.sum(-1).mean()


class MHGD(RelationalLoss):
    r"""Divergence between the attention graphs that link consecutive stages in student and teacher.

    .. math::
        L = \sum_{\text{pairs}} \sum_{h, i} \mathrm{KL}\big(\sigma(\tanh A^S_{h,i}) \,\Vert\,
        \sigma(\tanh A^T_{h,i})\big), \qquad A_h = \mathrm{BN}(W_s V_B)_h\, \mathrm{BN}(W_r V_F)_h^\top

    for every two consecutive stages, front F and back B. :math:`V` holds one unit vector per sample: of the teacher the
    first right singular vector of its map (positions x channels), of the student that of its first four which is
    nearest to the teacher's, turned the same way. The attention heads :math:`W_s, W_r, \mathrm{BN}` are learnt on the
    teacher beforehand, by :class:`~lightning_rkd.modules.AttentionGraphEstimator`, and serve both networks; here they
    are frozen, their batch norms with running statistics folded into them. They are saved with the student, so that
    its checkpoint needs no estimator. In a ``DistillationModule`` the weight is fixed;
    :class:`~lightning_rkd.modules.MHGDModule` clips its gradient as the authors do.

    Paper and code: hyperbolic tangent, the direction of the divergence and the sum over everything are those of the
    authors' code; their poster shows no hyperbolic tangent. Departures: the first singular vector's sign, which an
    eigensolver leaves to chance, is fixed (it points along the map's mean); the gradient of the singular vectors is
    exact, where the code's is twice as long for maps with at least as many positions as channels, 1.06 to 1.10 times as
    long for others, and missing altogether for maps with two thirds to one and a half times as many positions as
    channels; where student and teacher differ in channels, which the paper does not
    consider, a 1 x 1 convolution without bias (ours), trained with the student, brings the student's to the teacher's.

    Shapes: maps (N, C_l, H_l, W_l), tokens (N, T_l, C_l) or (N, C_l) of at least two stages, as many in both networks;
    heights and widths may differ -> scalar. A batch of one row gives 0.

    Args:
        estimator: The result of stage 1: its checkpoint, read when training begins, or the network itself.
        student_dim: Channels of the student's maps; inferred if left out.
        teacher_dim: Channels of the teacher's maps; inferred if left out.
        heads: Graphs per pair of stages, as in stage 1.
        reduction: ``"official"`` sums over pairs, heads and entries, so grows with the batch; ``"mean"`` takes the mean
            over pairs, heads and rows.

    Raises:
        ValueError: No estimator; one of other channels or heads; fewer than two maps; unknown reduction.
        FileNotFoundError: The checkpoint does not exist.

    Reference:
        Lee and Song 2019, Graph-based Knowledge Distillation by Multi-head Attention Network, arXiv:1907.02226.

    Example:
        >>> from lightning_rkd.losses.parts.attention_graph import AttentionGraph
        >>> loss = MHGD(AttentionGraph(channels=(2, 3)))
        >>> maps = [torch.rand(5, 2, 8, 8), torch.rand(5, 3, 4, 4)]
        >>> loss(maps, maps)
        tensor(0.)
    """

    reference: ClassVar[Reference] = Reference(
        "lee2019graph",
        "read in code",
        source="sseung0703/KD_methods_with_TF, nets/Relation.py and nets/SVP.py",
        weight=1.0,
        weight_note="with the gradient clipped per variable",
        result="CIFAR-100 VGG: 67.02 (student alone 59.97)",
    )
    reads = "feature_maps"
    invariances = frozenset({"scale", "row scale"})

    attention: nn.ModuleList
    adapters: nn.ModuleList

    def __init__(
        self,
        estimator: str | Path | nn.Module | None = None,
        student_dim: Sequence[int] | None = None,
        teacher_dim: Sequence[int] | None = None,
        *,
        heads: int = 8,
        reduction: Reduction = "official",
    ) -> None:
        super().__init__()
        check_choice("MHGD", Reduction, reduction=reduction)
        self._estimator = (estimator,)  # in a tuple, so that a network is not registered as a part of this loss
        self._state: dict[str, Tensor] | None = None
        self._known = False
        self.heads, self.reduction = heads, reduction
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def prepare(self) -> None:
        """Read the result of stage 1, unless a checkpoint of this loss has been loaded."""
        (estimator,) = self._estimator
        if self._known:
            return
        if estimator is None:
            raise ValueError(
                "MHGD needs the attention graph of its teacher: train it first (stage 1: lightning-rkd fit --config "
                "cifar100_mhgd_estimator, or AttentionGraphEstimator in your own Trainer) and pass its checkpoint, "
                "MHGD(estimator='runs/cifar100_mhgd_estimator/last.ckpt')"
            )
        self._state = stage1.load_attention(estimator)
        if self._built:
            self._fill()

    def build(self, student_dim: tuple[int, ...], teacher_dim: tuple[int, ...]) -> None:
        if len(student_dim) != len(teacher_dim) or len(student_dim) < 2:
            raise ValueError(
                "MHGD relates consecutive stages, so it reads the maps of at least two, as many in both networks; "
                f"got maps of {student_dim} channels from the student and {teacher_dim} from the teacher: name lists "
                "of layers, student_layer=[...] and teacher_layer=[...]"
            )
        self.attention = stage1.attention_between(teacher_dim, self.heads, frozen=True)
        self.adapters = nn.ModuleList(
            nn.Identity() if s == t else nn.Linear(s, t, bias=False, dtype=torch.float32)
            for s, t in zip(student_dim, teacher_dim, strict=True)
        )
        if self._state is not None:
            self._fill()

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        of_teacher = [right_singular_vectors(flatten_positions(m, who="MHGD")).squeeze(2) for m in teacher]
        of_student = [
            align_vectors(right_singular_vectors(adapt(flatten_positions(m, who="MHGD")), _CANDIDATES), target)
            for m, adapt, target in zip(student, self.adapters, of_teacher, strict=True)
        ]
        graphs = [
            (attend(*of_student[n : n + 2]), attend(*of_teacher[n : n + 2])) for n, attend in enumerate(self.attention)
        ]
        divergences = torch.stack([graph_divergence(s, t, reduction=self.reduction) for s, t in graphs])
        return divergences.sum() if self.reduction == "official" else divergences.mean()

    def _fill(self) -> None:
        assert self._state is not None
        channels, heads = stage1.attention_sizes(self._state)
        wanted = self._sizes["teacher_dim"]
        if (channels, heads) != (wanted, self.heads):
            raise ValueError(
                f"MHGD: the estimator was trained on maps of {channels} channels with {heads} heads, but the teacher "
                f"gives maps of {wanted} channels, and heads={self.heads}; name the same teacher layers as in stage 1, "
                "and as many heads"
            )
        self.attention.load_state_dict(stage1.freeze_attention(self._state))
        self._state, self._known = None, True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._known = self._known or f"{prefix}sizes" in state_dict
