"""Residual Knowledge Distillation (Gao, Shen, Li and Loy 2020): an assistant learns what the student leaves over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_rkd.distillation.features import Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.weighting import Weight
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch, Key


class ResidualPair(nn.Module):
    r"""Two networks whose features are added, :math:`f_S(x) + f_A(x)`, and a classifier behind the sum if there is one.

    Args:
        student: S.
        assistant: A, whose features have the same shape.
        head: Takes the sum.

    Raises:
        ValueError: Features of different shapes.

    Example:
        >>> pair = ResidualPair(nn.Linear(3, 2), nn.Linear(3, 2))
        >>> x = torch.ones(4, 3)
        >>> torch.equal(pair(x), pair.student(x) + pair.assistant(x))
        True
    """

    def __init__(self, student: nn.Module, assistant: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.assistant = student, assistant
        self.head = nn.Identity() if head is None else head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sum, or what the head makes of it."""
        student, assistant = self.student(*args, **kwargs), self.assistant(*args, **kwargs)
        if student.shape != assistant.shape:
            raise ValueError(
                f"ResidualKD adds the features of student and assistant, so they need one shape: got "
                f"{tuple(student.shape)} and {tuple(assistant.shape)}; end both with a layer of the teacher's width"
            )
        return self.head(student + assistant)


class ResidualKD(DistillationModule):
    r"""Trains a student on the teacher's features and an assistant on what the student leaves over; both are deployed.

    .. math::
        L = \frac{1}{NE} \sum_i \lVert f_T(x_i) - f_S(x_i) \rVert^2 +
        \frac{1}{NE} \sum_i \big\lVert \big(f_T(x_i) - \bar{f}_S(x_i)\big) - f_A(x_i) \big\rVert^2

    f are features of E numbers per sample: embeddings or maps. :math:`\bar{f}_S` is a constant: the assistant's term
    does not reach the student, which learns exactly as it would alone. ``forward`` gives :math:`f_S + f_A`.

    Certainty: the abstract says that S mimics the feature maps of T and A learns the residual error between them; the
    squared distance and the sum at inference are from memory, and no code was found. Ours are the mean over the E
    numbers, the equal weights, and the single place at which features are compared.

    Departures: the paper (from memory) trains A after S; here both learn at once, and the assistant's target settles
    as the student does. Its method of dividing the channels of one network into S and A, so that the pair costs no more
    than that network, could not be recovered: choose two networks.

    Logged: ``distill/student`` and ``distill/assistant``, the two terms; and what
    :class:`~lightning_rkd.DistillationModule` logs.

    Args:
        student: S. Its output is :math:`f_S`.
        assistant: A, usually smaller. Its output is :math:`f_A`.
        teacher: T; needed to fit only.
        teacher_layer: Where to read :math:`f_T`: a dotted path, a function or a ``Tap``; ``None`` is the output.
        head: A classifier on :math:`f_S + f_A`, trained by the task loss; or a frozen copy of the teacher's.
        task_loss: On the sum or, with ``task_reads="logits"``, on what the head makes of it; its gradient reaches both
            networks.
        task_reads: ``"embedding"`` or ``"logits"``.
        metrics: As for :class:`~lightning_rkd.DistillationModule`, and so are the following.
        optimizer: From parameters to optimizer.
        lr_scheduler: From optimizer to scheduler.
        lr_interval: ``"epoch"`` or ``"step"``.
        batch_transform: From ``Batch`` to ``Batch``, in training.
        inputs: Key of the inputs in the batch.
        labels: Key of the labels.
        indices: Key of the sample indices.
        weight: Weight of both terms, a number or a function of the epoch.
        task_weight: Weight of the task loss, likewise.

    Raises:
        ValueError: Features of different shapes, several teacher layers, or a head that nothing trains.

    Reference:
        Gao, Shen, Li and Loy 2020, Residual Knowledge Distillation, arXiv:2002.09168.

    Example:
        >>> module = ResidualKD(nn.Linear(8, 4), nn.Linear(8, 4), teacher=nn.Linear(8, 4))
        >>> module(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    bibtex = BibTeX()
    reference = Reference(
        "gao2020residual",
        "from memory",
        source="the abstract, for what student and assistant learn; no code was found",
    )

    def __init__(
        self,
        student: nn.Module,
        assistant: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        teacher_layer: Tap | Callable[[nn.Module], Any] | str | None = None,
        head: nn.Module | None = None,
        task_loss: nn.Module | None = None,
        task_reads: Literal["embedding", "logits"] = "embedding",
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Batch], Batch] | None = None,
        inputs: Key | list[str] | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
        weight: Weight = 1.0,
        task_weight: Weight = 1.0,
    ) -> None:
        if not (teacher_layer is None or isinstance(teacher_layer, str | Tap) or callable(teacher_layer)):
            raise ValueError(f"ResidualKD compares features in one place: name one teacher_layer, got {teacher_layer}")
        if head is not None and task_loss is None and any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "ResidualKD: nothing trains the head: pass task_loss=... with task_reads='logits', or freeze it, "
                "head.requires_grad_(False)"
            )
        features: dict[str, Any] = {
            "embedding": Tap("head", at="input"),
            "feature_maps": [Tap("student", at="output"), Tap("assistant", at="output")],
        }
        super().__init__(
            ResidualPair(student, assistant, head),
            teacher,
            {"student": _Mimic(), "assistant": _Residual()},
            task_loss=task_loss,
            task_reads=task_reads,
            metrics=metrics,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            student_layer=features,
            teacher_layer=_twice(teacher_layer),
            inputs=inputs,
            labels=labels,
            indices=indices,
            weight=weight,
            task_weight=task_weight,
        )


class _Mimic(RelationalLoss):
    """The first term: features of student and teacher."""

    reads = "feature_maps"
    gather = False
    display_name = "ResidualKD"

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        _check(student, teacher)
        return F.mse_loss(student[0], teacher[0])


class _Residual(RelationalLoss):
    """The second term: features of the assistant and what the student, a constant here, leaves over."""

    reads = "feature_maps"
    gather = False
    display_name = "ResidualKD"

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        _check(student, teacher)
        return F.mse_loss(student[1], teacher[0] - student[0].detach())


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if student[0].shape != teacher[0].shape:
        raise ValueError(
            f"ResidualKD subtracts features, so they need one shape: student and assistant "
            f"{tuple(student[0].shape)}, teacher {tuple(teacher[0].shape)}; end student and assistant with a layer of "
            "the teacher's width"
        )


def _twice(layer: Any) -> dict[str, Any]:
    """The teacher is compared with two networks, so its maps are listed twice."""
    layer = Tap("", at="output") if layer is None else layer
    return {"embedding": layer, "feature_maps": [layer, layer]}
