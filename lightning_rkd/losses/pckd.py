"""PCKD (Ding et al. 2024): contrast with category centres, in which hard samples have little weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.functional.scales import centre_columns, limit_magnitude
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_classes, check_logits, check_positive
from lightning_rkd.losses.parts.projector import Projector
from lightning_rkd.utils.types import Outputs

_BASE_TEMPERATURE = 0.07


def preview_weights(
    logits: Tensor, labels: Tensor, view: Tensor | None = None, *, epoch: int = 0, growth: float = 1.005
) -> Tensor:
    r"""Weights of the rows, lower for hard samples; constants. See :class:`PCKD`.

    Shapes: (N, K), (N,), (N,) -> (N,), between 0 and 1.
    """
    hardness = F.cross_entropy(logits.detach(), labels, reduction="none")
    first = torch.ones_like(hardness) if view is None else (view == 0).to(hardness.dtype)
    mean = (hardness * first).sum() / first.sum().clamp(min=1)
    hardness = hardness / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    weights = torch.where(hardness <= growth ** (epoch + 1), torch.ones_like(hardness), (-hardness.square()).exp())
    if view is None:
        return weights
    same = view[:, None] == view
    number = same.tril(-1).sum(1)  # of the row among those of its view
    own = (number[:, None] == number) & (view == 0)
    if own.device.type == "cpu" and not own.any(1).all():
        row = int((~own.any(1)).nonzero()[0])
        raise ValueError(
            f"PCKD: row {row} is view {int(view[row])} of a sample whose view 0 is not in the batch; every view must "
            "hold the same samples in the same order, as batch_transform=Rotations() makes them"
        )
    return own.to(weights.dtype) @ weights


def category_contrast(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Supervised contrast between rows in the space of classes; see :class:`PCKD`.

    Shapes: products with the category centres of student and teacher (N, K), (N, K), labels (N,) -> (N,), for each row
    the sum of its two terms.
    """
    u = torch.cat([student, teacher])
    similarity = u @ u.T / temperature
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    positive = (labels[:, None] == labels).repeat(2, 2) & ~itself
    log_p = similarity - similarity.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
    loss = -(log_p * positive).sum(1) / positive.sum(1)
    return temperature / _BASE_TEMPERATURE * loss.view(2, -1).sum(0)


class PCKD(RelationalLoss):
    r"""Preview-based category contrast: relates samples to the category centres of both classifiers, easy ones first.

    .. math::
        L = \frac{\beta}{M} \sum_i w_i (\ell_i + \ell_{M + i}) + \alpha L_{corr} + f L_{align}
        + \frac{\delta T_{KL}^2}{N} \sum_{i : v_i = 0} w_i \, \mathrm{KL}(p^T_i \,\Vert\, p^S_i)

    over the M rows of a batch, among them the N of view 0.

    *Category contrast.* With learnt linear maps A and B, the student's features s, and the rows of the classifiers'
    weights :math:`W_S, W_T` as category centres, :math:`u_i = W_S \widehat{A s_i}` and
    :math:`u_{M+i} = W_T \widehat{B s_i}` (the hat is l2 normalisation). With :math:`P_a` the other rows of a's class,

    .. math::
        \ell_a = -\frac{T}{0.07} \frac{1}{|P_a|} \sum_{p \in P_a}
        \log \frac{\exp(u_a \cdot u_p / T)}{\sum_{b \ne a} \exp(u_a \cdot u_b / T)}.

    *Correlation of classifiers.* :math:`L_{corr}` is the mean squared difference of the two networks' :math:`[W, b]`;
    where their shapes differ, it is left out.

    *Alignment.* :math:`L_{align} = 2 - 2 \,\mathrm{mean}_i \cos(\mathrm{MLP}(s_i), t_i)`, with one hidden layer, of
    :math:`16 D_T`, batch-normalised.

    *Preview.* :math:`a_i` is the student's cross-entropy of sample i over its mean; :math:`w_i = 1` where
    :math:`a_i \le g^e` in the e-th epoch, else :math:`\exp(-a_i^2)`, so that hard samples have little weight. Rows of
    other views take the weight of their sample.

    The cross-entropy in the paper's total is the task loss. Its views are rotations:
    ``DistillationModule(batch_transform=Rotations(), task_reads="logits")``. Without views all rows count as view 0.

    Departures from the authors' code: weights are constants in both places, where theirs pass a gradient through the KL
    term (their :math:`\delta` is 0); the exact logarithm, where theirs adds 1e-7 inside; one MLP pass normalises over
    the rows of all ranks. The paper's text was not read.

    Shapes: ``Outputs`` with embedding (M, D_S) or (M, D_T), logits (M, K) and classifier (K, D), read at
    ``Tap(layer, at="classifier")`` -> scalar. The k-th row of every view must belong to the same sample.

    Args:
        student_dim: D_S; inferred if left out.
        teacher_dim: D_T; inferred if left out.
        contrast_weight: :math:`\beta`.
        correlation_weight: :math:`\alpha`.
        align_weight: f.
        kl_weight: :math:`\delta`.
        temperature: T.
        kl_temperature: :math:`T_{KL}`.
        growth: g.

    Reference:
        Ding et al. 2024, Preview-based Category Contrastive Learning for Knowledge Distillation, arXiv:2410.14143.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> def outputs(width):
        ...     head = torch.randn(3, width), torch.zeros(3)
        ...     return Outputs(torch.randn(4, width), torch.randn(4, 3), classifier=head)
        >>> PCKD()(outputs(2), outputs(5), labels=torch.tensor([0, 1, 2, 0]), epoch=0).detach()
        tensor(52.2091)
    """

    reads = ("embedding", "logits", "classifier")
    reference = Reference(
        "ding2024preview",
        "read in code",
        source="MuHeDing/PCKD, helper/losses.py and helper/loops.py; the MLP in ifding/DLKD, models/mlp_head.py",
        weight=1.0,
        weight_note="CIFAR-100, with the weights of its parts as they are by default",
        result="CIFAR-100 resnet32x4 to resnet8x4: 77.14, wrn40-2 to wrn16-2: 76.97; ImageNet resnet34 to resnet18: "
        "72.01, the authors",
    )

    to_student: Projector
    to_teacher: Projector
    align: nn.Sequential

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        contrast_weight: float = 0.05,
        correlation_weight: float = 1.0,
        align_weight: float = 20.0,
        kl_weight: float = 0.0,
        temperature: float = 4.0,
        kl_temperature: float = 4.0,
        growth: float = 1.005,
    ) -> None:
        super().__init__()
        check_positive("PCKD", temperature=temperature, kl_temperature=kl_temperature, growth=growth)
        self.contrast_weight, self.correlation_weight = contrast_weight, correlation_weight
        self.align_weight, self.kl_weight = align_weight, kl_weight
        self.temperature, self.kl_temperature, self.growth = temperature, kl_temperature, growth
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.to_student = Projector(student_dim, student_dim)
        self.to_teacher = Projector(student_dim, teacher_dim)
        hidden = 16 * teacher_dim
        self.align = nn.Sequential(
            nn.Linear(student_dim, hidden, dtype=torch.float32),
            nn.BatchNorm1d(hidden, track_running_stats=False, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(hidden, teacher_dim, dtype=torch.float32),
        )

    def forward(
        self, student: Outputs, teacher: Outputs, *, labels: Tensor, epoch: int, view: Tensor | None = None
    ) -> Tensor:
        s, s_logits, s_centres, s_bias = _unpack(student)
        t, t_logits, t_centres, t_bias = _unpack(teacher)
        if labels.ndim != 1:
            raise ValueError(
                f"PCKD: labels must be (N,) class numbers, got {labels.dtype} of {tuple(labels.shape)}; it does not go "
                "with mixed or soft labels"
            )
        check_logits(s_logits, t_logits, "PCKD", dims=(2,))
        check_classes(labels, s_logits.shape[1], "PCKD")
        if not len(s_centres) == len(t_centres) == s_logits.shape[1]:
            raise ValueError(
                f"PCKD: student and teacher must have the same classes, got {len(s_centres)} and {len(t_centres)} rows "
                f"in the classifiers and {s_logits.shape[1]} logits; read the layer that makes "
                "the logits, Tap(layer, at='classifier')"
            )
        weights = preview_weights(s_logits, labels, view, epoch=epoch, growth=self.growth)
        contrast = category_contrast(
            self.to_student(s) @ s_centres.T, self.to_teacher(s) @ t_centres.T, labels, temperature=self.temperature
        )
        rows = s if len(s) > 1 else s.expand(2, -1)  # batch normalisation refuses a single row; two have its statistics
        # the batch normalisation removes what all rows share, which would cost digits in the first layer
        rows = limit_magnitude(centre_columns(rows).to(s.dtype), (0, 1))
        align = 2 - 2 * F.cosine_similarity(self.align(rows)[: len(s)], limit_magnitude(t, 1)).mean()
        loss = self.contrast_weight * (weights * contrast).mean() + self.align_weight * align
        parts = [(a, b) for a, b in ((s_centres, t_centres), (s_bias, t_bias)) if a is not None and b is not None]
        if s_centres.shape == t_centres.shape and (s_bias is None) == (t_bias is None):
            difference = torch.cat([(a - b).flatten() for a, b in parts])
            loss = loss + self.correlation_weight * difference.square().mean()
        if self.kl_weight:
            p, q = (x / self.kl_temperature for x in (t_logits, s_logits))
            kl = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
            first = torch.ones_like(kl) if view is None else (view == 0).to(kl.dtype)
            mean = (weights * kl * first).sum() / first.sum().clamp(min=1)
            loss = loss + self.kl_weight * self.kl_temperature**2 * mean
        return loss


def _unpack(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return outputs.embedding, outputs.logits, *outputs.classifier  # type: ignore[misc] # the base class has checked them
