"""Features of one training step, on this rank or gathered over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rkd.distillation.features import CaptureError
from lightning_rkd.distillation.teachers.base import TeacherOutput
from lightning_rkd.distillation.teachers.ensemble import join_outputs
from lightning_rkd.losses.inputs import select_tap
from lightning_rkd.utils.distributed import Group, gather_rows, rank_and_size
from lightning_rkd.utils.types import Batch, Mix, Outputs, count_rows


class Needs(NamedTuple):
    """Features and context that some losses need.

    Attributes:
        student: Tap and field of every feature of the student.
        teacher: The same of the teacher.
        context: Labels, indices, view or mix.
    """

    student: tuple[tuple[str, str], ...]
    teacher: tuple[tuple[str, str], ...]
    context: frozenset[str]


@dataclass(slots=True)
class StepFeatures:
    """Features of student and teacher for the rows of one step.

    Attributes:
        batch: The local batch.
        student: Outputs of the student by tap; the rows of all ``views`` one after the other.
        teachers: Outputs of the teacher: none, one, or several where losses are averaged over teachers.
        views: How many times the student ran in the step.
        context: Labels, indices, views and mix of the rows, as losses take them.
    """

    batch: Batch
    student: dict[str, Outputs]
    teachers: Sequence[TeacherOutput] = ()
    views: int = 1
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def embedding(self) -> Outputs:
        """The student's outputs from which a loss without a named tap reads an embedding."""
        return select_tap(self.student, None, "embedding", who="student")  # type: ignore[no-any-return]

    @property
    def teacher_embedding(self) -> Outputs | None:
        """The same of the teacher; several teachers are joined."""
        found = [select_tap(one.features, None, "embedding", who="teacher") for one in self.teachers]
        if len(found) > 1:
            return join_outputs(found, [one.weight for one in self.teachers])
        return found[0] if found else None

    def number_views(self, device: torch.device) -> Tensor:
        """The view of each row: numbered call by call, and within a call as the batch numbers them."""
        own = self.batch.view
        if own is None:
            each = count_rows(self.student) // self.views
            return torch.arange(self.views, device=device).repeat_interleave(each)
        return torch.cat([own.to(device) + call * (own.max() + 1) for call in range(self.views)])

    def repeat_rows(self, name: str, rows: Any, device: torch.device) -> Tensor | None:
        """Labels or indices of the batch, once for each view.

        Raises:
            CaptureError: They are no tensor.
        """
        if rows is None:
            return None
        if not isinstance(rows, Tensor):
            raise CaptureError(
                f"the {name} of a batch must be a tensor, got {type(rows).__name__}: say where they are, {name}=..."
            )
        return torch.cat([rows.to(device)] * self.views)

    def gathered(self, needs: Needs, counts: list[int], group: Group) -> StepFeatures:
        """The needed features, of the rows of all ranks; every rank must call this.

        A tensor that several taps give or several losses read is gathered once.

        Args:
            needs: What is gathered; everything else is left out.
            counts: Rows of every rank.
            group: Process group.
        """
        known: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the local tensor, which stays alive in it

        def gather(x: Tensor) -> Tensor:
            if id(x) not in known:
                half = x.dtype in (torch.float16, torch.bfloat16)
                known[id(x)] = x, gather_rows(x.float() if half else x, counts, group)
            return known[id(x)][1]

        context = {
            key: _gather_mix(value, gather, counts, group) if isinstance(value, Mix) else gather(value)
            for key, value in self.context.items()
            if key in needs.context and value is not None
        }
        return StepFeatures(
            self.batch,
            _gather_fields(self.student, needs.student, gather),
            [replace(one, features=_gather_fields(one.features, needs.teacher, gather)) for one in self.teachers],
            self.views,
            self.context | context,
        )


def _gather_fields(
    outputs: Mapping[str, Outputs], fields: Sequence[tuple[str, str]], gather: Callable[[Tensor], Tensor]
) -> dict[str, Outputs]:
    found = {tap: Outputs(classifier=one.classifier) for tap, one in outputs.items()}
    for tap, name in fields:
        value = getattr(outputs[tap], name)
        if name != "classifier" and value is not None:
            setattr(found[tap], name, [gather(x) for x in value] if isinstance(value, list) else gather(value))
    return found


def _gather_mix(mix: Mix, gather: Callable[[Tensor], Tensor], counts: list[int], group: Group) -> Mix:
    first = sum(counts[: rank_and_size(group)[0]])  # of the rows of this rank
    labels = None if mix.labels is None else gather(mix.labels)
    return replace(mix, partners=gather(mix.partners + first), ratio=gather(mix.ratio), labels=labels)
