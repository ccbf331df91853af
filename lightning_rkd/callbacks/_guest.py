"""Puts a loss with tensors of its own into a module that somebody else wrote, and takes it out again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer


class Guest(nn.ModuleDict):
    """Losses inside a foreign module: trained, moved and synchronised with it, but absent from its ``state_dict``."""

    def __init__(self, losses: dict[str, nn.Module]) -> None:
        super().__init__(losses)
        self.register_load_state_dict_post_hook(_not_missing)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing is added to the host's; the callback saves the losses."""
        return {} if destination is None else destination

    def move_in(self, host: nn.Module) -> Callable[[], None]:
        """Become a submodule of the host, under a name that it does not use; returns the function that undoes it."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            # spawned ranks share it, and each would write to it
            if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
                tensor.data = tensor.data.clone()
        number = 0
        while hasattr(host, name := f"_distillation_losses_{number}"):
            number += 1
        self._address = name
        host.add_module(name, self)

        def undo() -> None:
            host._modules.pop(name, None)

        return undo


def _not_missing(guest: nn.Module, incompatible: Any) -> None:
    """The host's checkpoint does not hold the guest, and need not."""
    assert isinstance(guest, Guest)
    inside = f"{guest._address}."
    absent = [key for key in incompatible.missing_keys if inside in key]
    for key in absent:
        incompatible.missing_keys.remove(key)


def join_optimizer(guest: Guest, optimizers: list[Optimizer]) -> None:
    """Let the parameters that no optimizer holds join the first optimizer's first group.

    Never a group of their own: schedulers count groups when they are made.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    own = [(name, p) for name, p in guest.named_parameters() if p.requires_grad and id(p) not in held]
    if not own:
        return
    if not optimizers:
        raise ValueError(f"the losses have parameters, {own[0][0]} for one, but the module configures no optimizer")
    optimizers[0].param_groups[0]["params"].extend(p for _, p in own)
    rank_zero_info(
        f"{sum(p.numel() for _, p in own)} parameters of the distillation losses join the first parameter group of "
        f"{type(optimizers[0]).__name__}"
    )


def losses_with_tensors(losses: dict[str, Any]) -> dict[str, nn.Module]:
    """Those of the terms whose losses have, or will have, parameters or buffers."""
    return {n: t.loss for n, t in losses.items() if t.missing_sizes or [*t.loss.parameters(), *t.loss.buffers()]}
