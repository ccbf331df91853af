"""Multi-head Knowledge Distillation (Wang, Lohit, Jones and Fu 2020): classifiers on middle layers teach too."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.distillation.layers import Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_logits, check_positive, check_share
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.soft_target import soft_target
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Outputs


def soft_and_hard(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, alpha: float) -> Tensor:
    r"""D of :class:`MultiHeadDistillation`, with labels (N,) or soft labels (N, K)."""
    soft = soft_target(student, teacher, temperature=temperature)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


class MiddleHead(nn.Sequential):
    """Classifier on feature maps: two 3 x 3 convolutions with batch norm and ReLU, mean pooling, two linear layers.

    Shapes: (N, C, H, W) -> (N, K). ``padding`` is that of the first convolution; the second has none.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 256, padding: int = 0) -> None:
        super().__init__(
            nn.Conv2d(channels, width, kernel_size=3, padding=padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, num_classes),
        )
        self.smallest = 5 - 2 * padding

    def forward(self, maps: Tensor) -> Tensor:
        """The logits."""
        if maps.ndim != 4 or min(maps.shape[2:]) < self.smallest:
            raise ValueError(
                f"MultiHeadDistillation: a head takes maps (N, C, H, W) of at least {self.smallest} x {self.smallest}, "
                f"got {tuple(maps.shape)}; name convolutional layers, or pass head_padding=1 for small maps"
            )
        logits: Tensor = super().forward(maps)  # type: ignore[no-untyped-call]
        return logits


class MultiHeadDistillation(DistillationModule):
    r"""Trains a student by the soft targets of a teacher and of classifiers on both networks' middle layers.

    .. math::
        L &= D(z^s, z^t) + \sum_h \big[ \mathrm{CE}(z^t_h, y) + \beta\, D(z^s_h, z^t_h) \big] \\
        D(a, b) &= \alpha\, T^2\, \mathrm{KL}\big(\sigma(b / T) \,\Vert\, \sigma(a / T)\big) +
        (1 - \alpha)\, \mathrm{CE}(a, y)

    z are the logits of the networks, :math:`z_h` those of head h, a :class:`MiddleHead` on the h-th middle layer of
    either network. The teacher is frozen; its heads learn from the labels, and the student's heads from them. All heads
    are trained and saved with the student but not deployed: ``forward`` is the student's.

    Provenance: the equation, the heads and the defaults are from third-party code, and agree with the paper's abstract.

    Departure: in that code the student's term trains the teacher's heads too; here they are constant targets.

    Logged: ``distill/final`` and ``distill/heads``, the two terms of the equation.

    Args:
        student: A classifier.
        teacher: A classifier of the same classes; needed only to fit.
        student_layers: Dotted paths of the student's middle layers, which output maps.
        teacher_layers: As many of the teacher's, in the same order.
        student_logits: Dotted path of the layer that makes the student's logits, whose input is the embedding for
            metrics; with ``None`` the student's output is both.
        teacher_logits: The same for the teacher.
        temperature: T.
        alpha: Weight of the soft targets in D.
        beta: Weight of the heads.
        head_width: Channels of the heads.
        head_padding: 1 for maps smaller than 5 x 5.
        kwargs: Arguments of :class:`~lightning_rkd.DistillationModule` for metrics, optimization and batches.

    Reference:
        Wang, Lohit, Jones and Fu 2020, Multi-head Knowledge Distillation for Model Compression, arXiv:2012.02911.
        Heads and numbers: the benchmark code of Asadian and Salehi-Abari 2021, arXiv:2103.00497.

    Example:
        >>> from lightning_rkd.models.small import ConvNet
        >>> student, teacher = (ConvNet(widths=(w, w), embedding_dim=10) for w in (4, 8))
        >>> module = MultiHeadDistillation(student, teacher, ["backbone.stage1"], ["backbone.stage1"])
        >>> module(torch.zeros(2, 1, 12, 12)).shape
        torch.Size([2, 10])
    """

    bibtex = BibTeX()
    reference = Reference(
        "wang2020multihead",
        "read in code",
        source="third-party: aryanasadianuoit/Distilling-Knowledge-via-Intermediate-Classifiers, MHKD/mhkd_training.py",
        weight=0.5,
        weight_note="beta, with T = 4 and alpha = 0.1; CIFAR-100, the same code",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        student_layers: list[str] | None = None,
        teacher_layers: list[str] | None = None,
        *,
        student_logits: str | None = None,
        teacher_logits: str | None = None,
        temperature: float = 4.0,
        alpha: float = 0.1,
        beta: float = 0.5,
        head_width: int = 256,
        head_padding: Literal[0, 1] = 0,
        **kwargs: Any,
    ) -> None:
        layers = list(student_layers or ()), list(teacher_layers or ())
        if not layers[0] or len(layers[0]) != len(layers[1]):
            raise ValueError(
                "MultiHeadDistillation pairs middle layers of the two networks: name as many student_layers as "
                f"teacher_layers, at least one; got {layers[0]} and {layers[1]}"
            )
        check_positive("MultiHeadDistillation", temperature=temperature)
        check_share("MultiHeadDistillation", alpha=alpha)
        check_at_least("MultiHeadDistillation", 0, beta=beta)
        final = _Final(temperature, alpha)
        heads = _Heads(temperature, alpha, beta, head_width, head_padding)
        super().__init__(
            student=student, teacher=teacher, loss={"final": final, "heads": heads},
            student_layer=_tap(student_logits, layers[0]), teacher_layer=_tap(teacher_logits, layers[1]),
            input_layer=None, task_loss=None, task_reads="embedding", miner=None, weight=1.0, task_weight=1.0,
            gather=True, balance=None, compare_gradients=None, **kwargs,
        )  # fmt: skip


class _Final(RelationalLoss):
    """The first term of the equation."""

    reads = "logits"
    gather = False
    display_name = "MultiHeadDistillation"

    def __init__(self, temperature: float, alpha: float) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor) -> Tensor:
        check_logits(student, teacher, self.display_name)
        return soft_and_hard(student, teacher, labels, temperature=self.temperature, alpha=self.alpha)


class _Heads(RelationalLoss):
    """The sum over heads; the logits only tell the number of classes."""

    reads = ("feature_maps", "logits")
    gather = False
    display_name = "MultiHeadDistillation"
    heads: nn.ModuleList
    teacher_heads: nn.ModuleList

    def __init__(self, temperature: float, alpha: float, beta: float, width: int, padding: int) -> None:
        super().__init__()
        self.temperature, self.alpha, self.beta, self.width, self.padding = temperature, alpha, beta, width, padding
        self.set_sizes()

    def build(self, student_dim: tuple[int, ...], teacher_dim: tuple[int, ...], num_classes: int) -> None:
        self.heads, self.teacher_heads = (
            nn.ModuleList(MiddleHead(channels, num_classes, self.width, self.padding) for channels in dims)
            for dims in (student_dim, teacher_dim)
        )

    def forward(self, student: Outputs, teacher: Outputs, *, labels: Tensor) -> Tensor:
        assert student.feature_maps is not None
        assert teacher.feature_maps is not None
        losses = []
        for of_student, of_teacher, s, t in zip(
            self.heads, self.teacher_heads, student.feature_maps, teacher.feature_maps, strict=True
        ):
            zs, zt = of_student(s), of_teacher(t)
            mixed = soft_and_hard(zs, zt, labels, temperature=self.temperature, alpha=self.alpha)
            losses.append(F.cross_entropy(zt, labels) + self.beta * mixed)
        return torch.stack(losses).sum()


def _tap(logits: str | None, middle: list[str]) -> Any:
    """Layers of a network for its embedding, its logits and its maps."""
    final = Tap() if logits is None else Tap(logits, at="classifier")
    return {"embedding": final, "logits": final, "feature_maps": middle}
