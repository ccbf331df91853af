"""Interface of teachers: one network, a cache of its outputs, or several networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from lightning_rkd.distillation.layers import Layer
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.distributed import Group
from lightning_rkd.utils.types import Batch, Outputs


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """Outputs of one teacher in a step.

    Attributes:
        features: Outputs by tap.
        weight: Weight of the teacher in losses that are averaged over teachers; the weights of a step add up to 1.
        name: Name of the teacher in an ensemble, for messages.
    """

    features: dict[str, Outputs]
    weight: float = 1.0
    name: str = ""

    @property
    def title(self) -> str:
        """The teacher in messages."""
        return f"teacher {self.name!r}" if self.name else "teacher"


class BaseTeacher(ABC):
    """Base class of teachers. It is not an ``nn.Module``, so that it never becomes a submodule.

    A distiller calls :meth:`attach` before and :meth:`detach` after training, and :meth:`to` once the student's device
    is known. Shallow and deep copies share the networks, but not the hooks.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy(self)

    @abstractmethod
    def attach(self, layer: Layer | None) -> None:
        """Hook the layer whose features are read."""

    @abstractmethod
    def detach(self) -> None:
        """Remove the hooks and restore the networks; may be called twice."""

    @abstractmethod
    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Cast the networks with ``convert`` and move them to the student's device.

        Returns:
            Whether this is the first call since :meth:`attach`; later calls do nothing.
        """

    @abstractmethod
    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """Compute or read the features of a batch.

        Args:
            batch: Batch, whose ``teacher_inputs``, or else ``inputs``, the teacher receives.
            calls: Inputs instead of those, one entry per call of the student; the outputs are concatenated.
        """

    @abstractmethod
    def shares_parameters_with(self, network: nn.Module) -> bool:
        """True if training ``network`` would change the teacher."""

    @abstractmethod
    def check_same_on_ranks(self, group: Group = None) -> None:
        """Raise ``RuntimeError`` if ranks hold different teachers. Collective."""

    @abstractmethod
    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Raise ``ValueError`` if a loss cannot be computed from this teacher's features."""

    @property
    def needs_indices(self) -> bool:
        """True if batches must have sample indices."""
        return False

    @property
    def needs_data(self) -> bool:
        """True if :meth:`prepare_data` must be called before the first step."""
        return self.needs_indices

    def prepare_data(  # noqa: B027 - most teachers need nothing
        self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True
    ) -> None:
        """Check the loaders of a run, or read from them, before its first step. Collective.

        Args:
            loaders: Loaders of the training set, or, with ``train=False``, of an evaluation.
            unpack: Function from what they yield to a batch.
            group: Process group.
            train: Whether these are training data.
        """

    def taps(self, layer: Layer | None) -> frozenset[str]:
        """Names of the taps; an unnamed tap has the name ``""``."""
        return frozenset(layer) if isinstance(layer, Mapping) else frozenset({""})
