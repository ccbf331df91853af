"""Features of one training step, on this rank or gathered over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.distillation.teachers.base import TeacherOutput
from lightning_rkd.distillation.teachers.ensemble import join_outputs
from lightning_rkd.losses.inputs import select_tap
from lightning_rkd.utils.distributed import Group, gather_rows, rank_and_size
from lightning_rkd.utils.types import Batch, Mix, Outputs, first_tensor


class Needs(NamedTuple):
    """Features of student and teacher, by tap and field with the positions of the maps (``None``: all), and context."""

    student: Mapping[tuple[str, str], frozenset[int] | None]
    teacher: Mapping[tuple[str, str], frozenset[int] | None]
    context: frozenset[str]


@dataclass(slots=True)
class StepFeatures:
    """Features of student and teacher in one training step.

    Attributes:
        batch: Batch of this rank.
        student: Outputs of the student by tap; rows of several views follow one another.
        teachers: Outputs of the teacher, or of each teacher that losses are averaged over.
        views: Number of calls of the student in the step.
        parts: Number of micro-batches in which it ran.
        context: Further inputs of losses: labels, indices, view and mix of the rows.
    """

    batch: Batch
    student: dict[str, Outputs]
    teachers: Sequence[TeacherOutput] = ()
    views: int = 1
    parts: int = 1
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def embedding(self) -> Outputs:
        """Outputs of the student at the tap of its embedding."""
        return select_tap(self.student, None, "embedding", who="student")  # type: ignore[no-any-return]

    @property
    def teacher_embedding(self) -> Outputs | None:
        """Outputs of the teacher at the tap of its embedding; those of several teachers are joined."""
        found = [select_tap(one.features, None, "embedding", who="teacher") for one in self.teachers]
        if len(found) > 1:
            return join_outputs(found, [one.weight for one in self.teachers])
        return found[0] if found else None

    def add_context(self, needs: Collection[str], calls: Sequence[int], device: torch.device) -> None:
        """Add labels, indices, view and mix of the rows to the context, as far as losses need them.

        ``calls`` are the numbers of rows in each call of the student.
        """
        batch = self.batch
        for key, rows in (("labels", batch.labels), ("indices", batch.indices)):
            if key in needs:
                self.context[key] = self._repeat_rows(key, rows, device)
        if self.views > 1:
            counts = {len(x) // len(calls) for x in self.context.values() if x is not None} | set(calls)
            if len(counts) > 1:
                raise CaptureError(
                    f"the student layer ran on {', '.join(map(str, calls))} rows in one step, which are no "
                    f"{len(calls)} views of the batch, so that their labels and indices are unknown: call the layer "
                    "once, or on the whole batch each time"
                )
        if "view" in needs:
            self.context["view"] = self._number_views(device)
        if "mix" in needs:
            self.context["mix"] = batch.mix

    def _number_views(self, device: torch.device) -> Tensor:
        """View of each row, numbered call by call, and within a call as in the batch."""
        own = self.batch.view
        if own is None:
            each = len(first_tensor(self.student)) // self.views
            return torch.arange(self.views, device=device).repeat_interleave(each)
        return torch.cat([own.to(device) + call * (own.max() + 1) for call in range(self.views)])

    def _repeat_rows(self, name: str, rows: Any, device: torch.device) -> Tensor | None:
        """Labels or indices of the batch, once for each view."""
        if rows is None:
            return None
        if not isinstance(rows, Tensor):
            raise CaptureError(
                f"the {name} of a batch must be a tensor, got {type(rows).__name__}: say where they are, {name}=..."
            )
        return torch.cat([rows.to(device)] * self.views)

    def gathered(self, needs: Needs, counts: list[int], group: Group) -> StepFeatures:
        """Gather the rows of all ranks of what is needed, each tensor once. Collective: every rank must call it."""
        known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the local tensor too, so that its id stays valid

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
            self.parts,
            self.context | context,
        )


def _gather_fields(
    outputs: Mapping[str, Outputs],
    fields: Mapping[tuple[str, str], frozenset[int] | None],
    gather: Callable[[Tensor], Tensor],
) -> dict[str, Outputs]:
    """Gather fields; feature maps that no loss reads keep their places, and the rows of this rank."""
    found = {tap: Outputs(classifier=one.classifier) for tap, one in outputs.items()}
    for (tap, name), positions in fields.items():
        value = getattr(outputs[tap], name)
        if isinstance(value, list):
            every = range(len(value)) if positions is None else {n % len(value) for n in positions}
            setattr(found[tap], name, [gather(x) if n in every else x for n, x in enumerate(value)])
        elif name != "classifier" and value is not None:
            setattr(found[tap], name, gather(value))
    return found


def _gather_mix(mix: Mix, gather: Callable[[Tensor], Tensor], counts: list[int], group: Group) -> Mix:
    first = sum(counts[: rank_and_size(group)[0]])  # number of this rank's first row
    labels = None if mix.labels is None else gather(mix.labels)
    return replace(mix, partners=gather(mix.partners + first), ratio=gather(mix.ratio), labels=labels)
