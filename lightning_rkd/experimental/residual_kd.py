"""Residual Knowledge Distillation (Gao, Shen, Li and Loy 2020): an assistant learns the student's residual error."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.distillation.layers import Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.modules.distillation import DistillationModule


class ResidualPair(nn.Module):
    """Two networks whose features are added, and a classifier on the sum if there is one."""

    def __init__(self, student: nn.Module, assistant: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.assistant = student, assistant
        self.head = nn.Identity() if head is None else head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sum of the features, or the head's output."""
        student, assistant = self.student(*args, **kwargs), self.assistant(*args, **kwargs)
        if student.shape != assistant.shape:
            raise ValueError(
                f"ResidualKD adds the features of student and assistant, so they need one shape: got "
                f"{tuple(student.shape)} and {tuple(assistant.shape)}; end both with a layer of the teacher's width"
            )
        return self.head(student + assistant)


class ResidualKD(DistillationModule):
    r"""Trains a student on the teacher's features and an assistant on the residual error; both are deployed.

    .. math::
        L = \frac{1}{NE} \sum_i \lVert f_T(x_i) - f_S(x_i) \rVert^2 +
        \frac{1}{NE} \sum_i \big\lVert \big(f_T(x_i) - \bar{f}_S(x_i)\big) - f_A(x_i) \big\rVert^2

    f are features of E numbers per sample: embeddings or maps. :math:`\bar{f}_S` is a constant: the assistant's term
    does not reach the student, which learns exactly as it would alone. ``forward`` returns :math:`f_S + f_A`.

    Provenance: the abstract says that S mimics the feature maps of T and A learns the residual error between them; the
    squared distance and the sum at inference are from memory, and no code was found. Ours are the mean over the E
    numbers, the equal weights, and the single place at which features are compared.

    Departures: the paper (from memory) trains A after S; here both learn at once, and the assistant's target converges
    with the student. Its method of dividing the channels of one network into S and A, so that the pair costs no more
    than that network, could not be recovered: choose two networks.

    Logged: ``distill/student`` and ``distill/assistant``, the two terms, besides the values that
    :class:`~lightning_rkd.DistillationModule` logs.

    Args:
        student: S. Its output is :math:`f_S`.
        assistant: A, usually smaller. Its output is :math:`f_A`.
        teacher: T; needed only to fit.
        teacher_layer: Layer of :math:`f_T`: a dotted path, a function or a ``Tap``; a layer gives its output. ``None``
            is the output.
        head: A classifier on :math:`f_S + f_A`, trained by the task loss; or a frozen copy of the teacher's.
        task_loss: Loss of the sum or, with ``task_reads="logits"``, of the head's output; its gradient reaches both
            networks.
        kwargs: Arguments of :class:`~lightning_rkd.DistillationModule` for the task, weights, metrics, optimization and
            batches.

    Reference:
        Gao, Shen, Li and Loy 2020, Residual Knowledge Distillation, arXiv:2002.09168.

    Example:
        >>> import torch
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
        **kwargs: Any,
    ) -> None:
        if not (teacher_layer is None or isinstance(teacher_layer, str | Tap) or callable(teacher_layer)):
            raise ValueError(f"ResidualKD compares features in one place: name one teacher_layer, got {teacher_layer}")
        if head is not None and task_loss is None and any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "ResidualKD: nothing trains the head: pass task_loss=... with task_reads='logits', or freeze it, "
                "head.requires_grad_(False)"
            )
        target: Any = teacher_layer or ""
        features: dict[str, Any] = {
            "embedding": Tap("head", at="input"),
            "feature_maps": ["student", "assistant"],
        }
        super().__init__(
            student=ResidualPair(student, assistant, head), teacher=teacher, task_loss=task_loss,
            loss={"student": _SquaredError(0), "assistant": _SquaredError(1)}, student_layer=features, input_layer=None,
            teacher_layer={"embedding": target, "feature_maps": [target, target]}, miner=None, gather=True,
            balance=None, compare_gradients=None, **kwargs,
        )  # fmt: skip


class _SquaredError(RelationalLoss):
    """One of the two terms: 0 compares the student with the teacher, 1 the assistant with the student's residual."""

    reads = "feature_maps"
    gather = False
    display_name = "ResidualKD"

    def __init__(self, term: Literal[0, 1]) -> None:
        super().__init__()
        self.term = term

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        mimic, target = student[0], teacher[0]
        if mimic.shape != target.shape:
            raise ValueError(
                f"ResidualKD subtracts features, so they need one shape: student and assistant {tuple(mimic.shape)}, "
                f"teacher {tuple(target.shape)}; end student and assistant with a layer of the teacher's width"
            )
        return F.mse_loss(student[1], target - mimic.detach()) if self.term else F.mse_loss(mimic, target)
