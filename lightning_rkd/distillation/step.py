"""What the networks show in one step, and which rows those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.distillation.features import CaptureError
from lightning_rkd.distillation.teachers.base import Lesson
from lightning_rkd.distillation.teachers.ensemble import joint
from lightning_rkd.losses.base import at_tap
from lightning_rkd.utils.types import Batch, Outputs


@dataclass(slots=True)
class Shown:
    """What one step showed: per tap, the rows of all ``views`` (student calls) one after the other.

    There is no lesson where nobody taught, one from a teacher, and several where losses are averaged over teachers.
    """

    batch: Batch
    student: dict[str, Outputs]
    lessons: Sequence[Lesson] = ()
    views: int = 1

    @property
    def embedding(self) -> Outputs:
        """The student's outputs that a loss without a named tap reads an embedding from."""
        return at_tap(self.student, None, "embedding", who="student")  # type: ignore[no-any-return]

    @property
    def teacher_embedding(self) -> Outputs | None:
        """The same for the teacher; several are joined."""
        shown = [at_tap(lesson.shown, None, "embedding", who="teacher") for lesson in self.lessons]
        if len(shown) > 1:
            return joint(shown, [lesson.share for lesson in self.lessons])
        return shown[0] if shown else None

    def view_numbers(self, device: torch.device) -> Tensor:
        """The number of the view of each row: student call by student call, and within a call as the batch says."""
        own = self.batch.view
        if own is None:
            each = rows_in(self.student) // self.views
            return torch.arange(self.views, device=device).repeat_interleave(each)
        return torch.cat([own.to(device) + call * (own.max() + 1) for call in range(self.views)])

    def repeated(self, name: str, rows: Any, device: torch.device) -> Tensor | None:
        """Labels or indices of the batch, once for each view.

        Raises:
            CaptureError: They are no tensor.
        """
        if not (rows is None or isinstance(rows, Tensor)):
            raise CaptureError(
                f"the {name} of a batch must be a tensor, got {type(rows).__name__}: say where they are, {name}=..."
            )
        return None if rows is None else torch.cat([rows.to(device)] * self.views)


def first_in(shown: Mapping[str, Outputs]) -> Tensor:
    """The first tensor that a network shows.

    Raises:
        CaptureError: There is none.

    Example:
        >>> first_in({"": Outputs(embedding=torch.zeros(2, 3))}).shape
        torch.Size([2, 3])
    """
    for outputs in shown.values():
        for x in outputs.tensors():
            return x
    raise CaptureError("the tapped layers show no tensor")


def rows_in(shown: Mapping[str, Outputs]) -> int:
    """How many rows a network shows.

    Example:
        >>> rows_in({"": Outputs(embedding=torch.zeros(2, 3))})
        2
    """
    return len(first_in(shown))
