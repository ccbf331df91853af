"""The teacher: a frozen network that is not a submodule of anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import FeatureReader, Layer
from lightning_rkd.distillation.teachers.base import BaseTeacher, TeacherOutput
from lightning_rkd.distillation.teachers.weights import load_weights
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.distributed import Group, gather_rows, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.private import get_slots, set_slots, tree_leaves, tree_map
from lightning_rkd.utils.types import Batch, Outputs


class Teacher(BaseTeacher):
    """A frozen network: in eval mode, without gradients, and registered nowhere.

    Being no ``nn.Module``, it is absent from checkpoints, optimizers, parameter counts, DDP buckets, ``train()`` and
    ``unfreeze()``. Copies of whatever refers to it share the one network.

    Args:
        network: The teacher network. It is moved and cast when training begins and restored afterwards.
        weights: File with the network's weights, read when training begins and never before: a Lightning checkpoint
            (of ``DistillationModule`` or any module that holds the network under some prefix), a state dict saved with
            ``torch.save``, or a ``.safetensors`` file. ``None`` takes the network as it is.
        move: Whether to move and cast the network; ``False`` for one that is sharded or quantised. It then has to
            take inputs on the device and in the precision in which the student gets them.
        channels_last: Whether a convolutional network works on images stored channels last, which is faster on GPUs
            with half precision and on many CPUs. To compile it as well, pass ``torch.compile(network)``.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3))
        >>> teacher.attach(None)
        >>> teacher(Batch(inputs=torch.ones(2, 4)))[""].embedding.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, network: nn.Module, weights: str | Path | None = None, move: bool = True, channels_last: bool = False
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"a teacher is an nn.Module, got {type(network).__name__}")
        if channels_last and not move:
            raise ValueError("channels_last=True changes how the network is stored, which move=False forbids")
        self.network, self.weights, self.move, self.channels_last = network, weights, move, channels_last
        self._loaded = weights is None
        self._reader: FeatureReader | None = None
        self._home: _Home | None = None
        self._prepared = False

    def __getstate__(self) -> dict[str, Any]:
        """State of shallow copies and pickles: without hooks, and without the duty to restore the network."""
        return self.__dict__ | {"_reader": None, "_home": None, "_prepared": False}

    def attach(self, layer: Layer | None) -> None:
        """Read the weights file if there is one, and hook the layer."""
        if not self._loaded:
            assert self.weights is not None
            run_on_all_ranks(partial(load_weights, self.network, self.weights))  # a machine may lack the file
            self._loaded = True
        self.detach()
        self._reader = FeatureReader(layer, "teacher")
        self._reader.attach(self.network)
        self._home = _Home.enter(self.network)

    def detach(self) -> None:
        """Remove the hooks and restore the network."""
        if self._reader is not None:
            self._reader.detach()
        if self._home is not None:
            self._home.leave()
        self._home, self._prepared = None, False

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Move the network, after ``convert`` (a precision plugin's) has cast it; :meth:`detach` undoes both.

        Returns whether it was the first call since :meth:`attach`; the others do nothing.

        Raises:
            RuntimeError: The teacher has not been attached.
            ValueError: It is sharded, and not to be left where it is.
        """
        if self._home is None:
            raise RuntimeError("attach the teacher to a layer before moving it")
        if self._prepared:
            return False
        self._prepared = True
        if self.move:
            if any(map(_is_part, self.network.parameters())):
                raise ValueError(
                    "the teacher is sharded over ranks, so it could not be restored after being moved: "
                    "leave it where it is, Teacher(network, move=False)"
                )
            self._home.remember_tensors()
            if convert is not None:
                convert(self.network)
            self.network.to(device)
            if self.channels_last:
                self.network.to(memory_format=torch.channels_last)
        return True

    def __call__(self, batch: Batch, calls: list[Any] | None = None) -> dict[str, Outputs]:
        """Outputs of the teacher for a batch, by tap.

        Args:
            batch: Its ``teacher_inputs`` are used where given, else its ``inputs``.
            calls: Inputs to use instead, one entry per student call; the results are concatenated.
        """
        if self._reader is None:
            raise RuntimeError("attach the teacher to a layer before calling it")
        if calls is None:
            calls = [batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs]
        self.network.eval()
        self._reader.start()
        try:
            with torch.no_grad():
                for inputs in calls:
                    inputs = tree_map(_channels_last, inputs) if self.channels_last else inputs
                    self.network(**inputs) if isinstance(inputs, Mapping) else self.network(inputs)
            outputs, _ = self._reader.collect()
        finally:
            self._reader.stop()
        return outputs

    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """The network's outputs, as a list of one."""
        return [TeacherOutput(self(batch, calls))]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change the teacher."""
        own = {id(p) for p in self.network.parameters()}
        return any(id(p) in own for p in network.parameters())

    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Accept any loss."""

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Compare a checksum of the weights over ranks, which DDP does not broadcast for a teacher.

        Of a sharded teacher every rank holds a part of its own: there is nothing to compare.

        Raises:
            RuntimeError: Ranks hold different teachers.
        """
        tensors = list(_whole_tensors(self.network))
        if not tensors or rank_and_size(group)[1] == 1:
            return
        checksum = torch.stack([number * _checksum(t) for number, t in enumerate(tensors, start=1)]).sum()
        every = gather_rows(checksum[None], group=group).tolist()
        if len(set(every)) > 1:
            raise RuntimeError(
                f"the teacher's weights differ between ranks (checksums {every}): build it from the same weights file "
                "or seed on every rank"
            )


class _Home:
    """State of a network before teachers used it: modes and tensors. The last teacher to leave restores them."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.teachers = network, 0
        self.modes = [(module, module.training) for module in network.modules()]
        self.tensors: list[tuple[nn.Parameter, Tensor]] = []
        self.slots: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    @staticmethod
    def enter(network: nn.Module) -> _Home:
        home = _homes.setdefault(network, _Home(network))
        home.teachers += 1
        return home

    def remember_tensors(self) -> None:
        if not self.slots:
            self.tensors = [(p, p.data) for p in self.network.parameters()]
            # .to() replaces buffers
            self.slots = [(m, *get_slots(m)) for m in self.network.modules()]

    def leave(self) -> None:
        self.teachers -= 1
        if self.teachers:
            return
        del _homes[self.network]
        for module, training in self.modes:
            module.training = training
        for tensor, data in self.tensors:
            tensor.data = data
        for module, parameters, buffers in self.slots:
            set_slots(module, parameters, buffers)


_homes: dict[nn.Module, _Home] = {}  # of the networks that teach at the moment; several callbacks may share one


def _channels_last(x: Any) -> Any:
    images = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if images else x


def _whole_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and the packed weights of quantised layers; not the parts of sharded tensors."""
    packed = (t for t in tree_leaves(network.state_dict()) if isinstance(t, Tensor) and t.is_quantized)
    for tensor in (*network.parameters(), *network.buffers(), *packed):
        if not _is_part(tensor):
            yield tensor.detach()


def _is_part(x: Tensor) -> bool:
    """Whether a rank holds but a part of it (a DTensor)."""
    return hasattr(x, "full_tensor")


def _checksum(x: Tensor) -> Tensor:
    """Of the bits, in integers: the same on every machine, in whatever order it is summed up."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x.int_repr() if x.is_quantized else x
    flat = torch.view_as_real(whole).reshape(-1) if whole.is_complex() else whole.reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)
