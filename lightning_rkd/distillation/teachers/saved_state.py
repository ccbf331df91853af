"""Tensors of a teacher's network: restored after training, taken apart, summed up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.utils.private import get_slots, set_slots


class SavedState:
    """Modes and tensors of a network before training, restored when its last teacher is detached."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.teachers = network, 0
        self.modes = [(module, module.training) for module in network.modules()]
        self.tensors: list[tuple[nn.Parameter, Tensor]] = []
        self.slots: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self.has_subclasses = False

    @staticmethod
    def enter(network: nn.Module) -> SavedState:
        """State of a network, shared by all its attached teachers."""
        home = _saved_states.setdefault(network, SavedState(network))
        home.teachers += 1
        return home

    def remember_tensors(self) -> None:
        """Remember the tensors, before the network is cast and moved."""
        if not self.slots:
            parameters = list(self.network.parameters())
            self.tensors = [(p, p.data) for p in parameters if not is_subclass(p)]
            # .to() replaces buffers
            self.slots = [(m, *get_slots(m)) for m in self.network.modules()]
            # and writes over the insides of tensor subclasses, which twins spare
            twins = {p: nn.Parameter(p.detach(), p.requires_grad) for p in parameters if is_subclass(p)}
            self.has_subclasses = bool(twins)
            for module, own, buffers in self.slots if twins else ():
                set_slots(module, {k: p if p is None else twins.get(p, p) for k, p in own.items()}, buffers)

    def leave(self) -> None:
        """Restore the network, if this is its last teacher."""
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


_saved_states: dict[nn.Module, SavedState] = {}  # of attached networks, which several teachers may share


def plain_tensors(x: Tensor) -> Iterator[Tensor]:
    """The tensor, or the plain ones that a tensor subclass consists of, such as the integers and scales of torchao."""
    if is_subclass(x):
        for name in x.__tensor_flatten__()[0]:  # type: ignore[attr-defined] # the protocol of subclasses
            yield from plain_tensors(getattr(x, name))
    else:
        yield x.detach()


def is_subclass(x: Tensor) -> bool:
    """True for a tensor made of others, as torchao's quantised weights are."""
    return hasattr(x, "__tensor_flatten__")


def is_sharded(x: Tensor) -> bool:
    """True if a tensor is sharded over ranks (a ``DTensor``)."""
    return hasattr(x, "full_tensor")


def compute_checksum(x: Tensor) -> Tensor:
    """Checksum of the bits in integers, independent of machine and summation order."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x.int_repr() if x.is_quantized else x
    flat = torch.view_as_real(whole).reshape(-1) if whole.is_complex() else whole.reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)
