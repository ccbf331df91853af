"""What the engine asks of whoever teaches, be it one network or several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from lightning_rkd.distillation.features import Layer
from lightning_rkd.losses.base import Term
from lightning_rkd.utils.distributed import Group
from lightning_rkd.utils.types import Batch, Outputs


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the student is compared with in one step; a step has one lesson, or one from each of several teachers.

    Attributes:
        shown: What the teacher shows, per tap.
        share: Factor of the loss; those of a step add up to 1.
        teacher: Its name, for messages; empty where there is but one.
    """

    shown: dict[str, Outputs]
    share: float = 1.0
    teacher: str = ""

    @property
    def who(self) -> str:
        """The teacher in messages.

        Example:
            >>> Lesson({}).who, Lesson({}, 0.5, "big").who
            ('teacher', "teacher 'big'")
        """
        return f"teacher {self.teacher!r}" if self.teacher else "teacher"


class BaseTeacher(ABC):
    """Whoever teaches: not an ``nn.Module``, so that it is registered nowhere.

    ``attach`` and ``detach`` bracket a fit, ``to`` follows when the student's device is known. Copies, deep ones too,
    share the networks, but not what a fit has attached.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy(self)

    @abstractmethod
    def attach(self, layer: Layer | None) -> None:
        """Get ready to be read at a layer."""

    @abstractmethod
    def detach(self) -> None:
        """Leave everything as it was; safe to call twice."""

    @abstractmethod
    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Follow the student to a device, after ``convert`` (a precision plugin's) has cast what is moved.

        Returns whether it was the first call since ``attach``; there is nothing to do in the others.
        """

    @abstractmethod
    def lessons(self, batch: Batch, calls: list[Any] | None = None) -> list[Lesson]:
        """What to compare the student with, for a batch.

        Args:
            batch: Its ``teacher_inputs`` are used where given, else its ``inputs``.
            calls: Inputs to use instead, one entry per student call; the results are concatenated.
        """

    @abstractmethod
    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change the teacher."""

    @abstractmethod
    def check_same_on_ranks(self, group: Group = None) -> None:
        """Make sure that all ranks learn from the same teacher.

        Raises:
            RuntimeError: They do not.
        """

    @abstractmethod
    def check_loss(self, name: str, term: Term) -> None:
        """Refuse a loss that cannot be computed from what it shows.

        Raises:
            ValueError: The loss is such a one.
        """

    @property
    def needs_indices(self) -> bool:
        """Whether it must be told which rows of the root data set a batch holds; loaders are then made to say so."""
        return False

    def meet(  # noqa: B027 - most have no use for it
        self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True
    ) -> None:
        """Look at the loaders of a run before its first step; every rank calls this.

        Args:
            loaders: Of the training set, or else (``train=False``) of an evaluation whose batches it will see.
            unpack: From what they yield to a batch.
            group: Process group.

        Raises:
            ValueError: It cannot teach these data.
        """

    def taps(self, layer: Layer | None) -> frozenset[str]:
        """The names under which it is read; a layer without a name has the name ``""``."""
        return frozenset(layer) if isinstance(layer, Mapping) else frozenset({""})
