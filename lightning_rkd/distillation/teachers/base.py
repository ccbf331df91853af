"""Interface of teachers: one network, a cache of its outputs, or several networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from lightning_rkd.distillation.features import Layer
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.distributed import Group
from lightning_rkd.utils.types import Batch, Outputs


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """Outputs of a teacher for one step; a step has one, or one of each of several teachers.

    Attributes:
        features: Outputs by tap.
        weight: Factor of the loss; those of a step add up to 1.
        name: Name of the teacher, for messages; empty where there is only one.
    """

    features: dict[str, Outputs]
    weight: float = 1.0
    name: str = ""

    @property
    def title(self) -> str:
        """The teacher in messages.

        Example:
            >>> TeacherOutput({}).title, TeacherOutput({}, 0.5, "big").title
            ('teacher', "teacher 'big'")
        """
        return f"teacher {self.name!r}" if self.name else "teacher"


class BaseTeacher(ABC):
    """Base of all teachers. It is not an ``nn.Module``, so that it is registered nowhere.

    ``attach`` and ``detach`` bracket a fit; ``to`` follows when the student's device is known. Copies, deep ones too,
    share the networks, but not what a fit has attached.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy(self)

    @abstractmethod
    def attach(self, layer: Layer | None) -> None:
        """Hook the layer from which features are read."""

    @abstractmethod
    def detach(self) -> None:
        """Restore the networks; safe to call twice."""

    @abstractmethod
    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Move to the student's device, after ``convert`` (a precision plugin's) has cast what is moved.

        Returns whether it was the first call since ``attach``; the others do nothing.
        """

    @abstractmethod
    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """Compute or read the features of a batch.

        Args:
            batch: Its ``teacher_inputs`` are used where given, else its ``inputs``.
            calls: Inputs to use instead, one entry per student call; the results are concatenated.
        """

    @abstractmethod
    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change the teacher."""

    @abstractmethod
    def check_same_on_ranks(self, group: Group = None) -> None:
        """Make sure that all ranks have the same teacher.

        Raises:
            RuntimeError: They do not.
        """

    @abstractmethod
    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Refuse a loss that cannot be computed from this teacher's features.

        Raises:
            ValueError: It cannot.
        """

    @property
    def needs_indices(self) -> bool:
        """Whether batches must say which rows of the root data set they hold."""
        return False

    def prepare_data(  # noqa: B027 - most teachers need nothing
        self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True
    ) -> None:
        """Check the loaders of a run, or read ahead from them, before its first step; every rank calls this.

        Args:
            loaders: Of the training set, or else (``train=False``) of an evaluation that compares with the teacher.
            unpack: From what they yield to a batch.
            group: Process group.

        Raises:
            ValueError: The teacher does not belong to these data.
        """

    def taps(self, layer: Layer | None) -> frozenset[str]:
        """Names of the taps; a layer without a name has the name ``""``."""
        return frozenset(layer) if isinstance(layer, Mapping) else frozenset({""})
