"""A frozen network as the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from lightning_rkd.utils.types import Batch, Outputs, call_network


class Teacher(BaseTeacher):
    """A frozen network, in evaluation mode and without gradients.

    It is not an ``nn.Module``, so the network is absent from checkpoints, optimizers, parameter counts and DDP buckets,
    and ``train()`` and ``unfreeze()`` of the student do not reach it. Copies share the network.

    Args:
        network: The teacher network. It is moved and cast when training begins, and restored afterwards.
        weights: File with the weights of the network, read when training begins: a Lightning checkpoint (of a
            ``DistillationModule``, or of any module that contains the network), a state dict saved with ``torch.save``,
            or a ``.safetensors`` file. ``None`` keeps the weights of ``network``.
        move: Whether to move and cast the network. Pass ``False`` for a sharded or quantised network, which then
            receives inputs on the student's device and in the student's precision.
        channels_last: Whether to store weights and images in the channels-last format, which makes convolutional
            networks faster on GPUs in half precision and on many CPUs.

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
        self._saved_state: _SavedState | None = None
        self._prepared = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_saved_state": None, "_prepared": False}

    def attach(self, layer: Layer | None) -> None:
        """Load the weights file, if any, and hook the layer."""
        if not self._loaded:
            assert self.weights is not None
            load = partial(load_weights, self.network, self.weights)
            run_on_all_ranks(load)  # the file may be missing on one machine
            self._loaded = True
        self.detach()
        self._reader = FeatureReader(layer, "teacher")
        self._reader.attach(self.network)
        self._saved_state = _SavedState.enter(self.network)

    def detach(self) -> None:
        """Remove the hooks and restore the network."""
        if self._reader is not None:
            self._reader.detach()
        if self._saved_state is not None:
            self._saved_state.leave()
        self._saved_state, self._prepared = None, False

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Cast the network with ``convert`` and move it, once after :meth:`attach`; :meth:`detach` undoes both.

        Raises:
            RuntimeError: The teacher has not been attached.
            ValueError: The network is sharded, and ``move`` is ``True``.
        """
        if self._saved_state is None:
            raise RuntimeError("attach the teacher to a layer before moving it")
        if self._prepared:
            return False
        self._prepared = True
        if self.move:
            if any(map(_is_sharded, self.network.parameters())):
                raise ValueError(
                    "the teacher is sharded over ranks, so it could not be restored after being moved: "
                    "leave it where it is, Teacher(network, move=False)"
                )
            self._saved_state.remember_tensors()
            if convert is not None:
                convert(self.network)
            self.network.to(device)
            if self.channels_last:
                self.network.to(memory_format=torch.channels_last)
        return True

    def __call__(self, batch: Batch, calls: list[Any] | None = None) -> dict[str, Outputs]:
        """Compute the outputs for a batch by tap; the arguments are those of :meth:`outputs`."""
        if self._reader is None:
            raise RuntimeError("attach the teacher to a layer before calling it")
        if calls is None:
            calls = [batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs]
        self.network.eval()
        self._reader.start()
        try:
            with torch.no_grad():
                for inputs in calls:
                    inputs = tree_map(_to_channels_last, inputs) if self.channels_last else inputs
                    call_network(self.network, inputs)
            outputs, _ = self._reader.collect()
        finally:
            self._reader.stop()
        return outputs

    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """Compute the features of a batch."""
        return [TeacherOutput(self(batch, calls))]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """True if training ``network`` would change the teacher."""
        own = {id(p) for p in self.network.parameters()}
        return any(id(p) in own for p in network.parameters())

    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Accept any loss."""

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Raise ``RuntimeError`` if a checksum of the weights (of unsharded ones) differs between ranks. Collective."""
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


class _SavedState:
    """Modes and tensors of a network before training, restored when its last teacher is detached."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.teachers = network, 0
        self.modes = [(module, module.training) for module in network.modules()]
        self.tensors: list[tuple[nn.Parameter, Tensor]] = []
        self.slots: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    @staticmethod
    def enter(network: nn.Module) -> _SavedState:
        home = _saved_states.setdefault(network, _SavedState(network))
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
        del _saved_states[self.network]
        for module, training in self.modes:
            module.training = training
        for tensor, data in self.tensors:
            tensor.data = data
        for module, parameters, buffers in self.slots:
            set_slots(module, parameters, buffers)


_saved_states: dict[nn.Module, _SavedState] = {}  # of attached networks, which several teachers may share


def _to_channels_last(x: Any) -> Any:
    images = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if images else x


def _whole_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and packed weights of quantised layers, without parts of sharded tensors."""
    packed = (t for t in tree_leaves(network.state_dict()) if isinstance(t, Tensor) and t.is_quantized)
    for tensor in (*network.parameters(), *network.buffers(), *packed):
        if not _is_sharded(tensor):
            yield tensor.detach()


def _is_sharded(x: Tensor) -> bool:
    """True if a tensor is sharded over ranks (a ``DTensor``)."""
    return hasattr(x, "full_tensor")


def _checksum(x: Tensor) -> Tensor:
    """Checksum of the bits in integers, independent of machine and summation order."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x.int_repr() if x.is_quantized else x
    flat = torch.view_as_real(whole).reshape(-1) if whole.is_complex() else whole.reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)
