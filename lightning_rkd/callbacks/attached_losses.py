"""Attaches losses with parameters or buffers to a LightningModule for the time of a fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_rkd.distillation.features import Hook
from lightning_rkd.losses.weighting import Term
from lightning_rkd.utils.private import get_hooks


class AttachedLosses(nn.ModuleDict):
    """Losses inside a user's module: trained, moved and synchronised with it, but absent from its ``state_dict``."""

    def __init__(self, losses: dict[str, nn.Module]) -> None:
        super().__init__(losses)
        self._module: list[nn.Module] = []
        self.register_load_state_dict_post_hook(_ignore_missing_keys)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """An empty one: the callback saves the losses."""
        return {} if destination is None else destination

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """Become a submodule of a module, under a free name; returns the function that undoes it."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            # spawned ranks share it, and each would write to it
            if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
                tensor.data = tensor.data.clone()
        number = 0
        while hasattr(module, name := f"_distillation_losses_{number}"):
            number += 1
        self._address = name
        self._module = [module]  # in a list: it is no submodule of its own losses
        module.add_module(name, self)

        def undo() -> None:
            if hasattr(module, name):
                delattr(module, name)
            self._module = []

        return undo


def _ignore_missing_keys(losses: nn.Module, incompatible: Any) -> None:
    """The module's checkpoint does not hold the losses, and need not; but nothing holds averages of them."""
    assert isinstance(losses, AttachedLosses)
    inside = f"{losses._address}."
    absent = [key for key in incompatible.missing_keys if inside in key]
    for key in absent:
        incompatible.missing_keys.remove(key)
    if any(key.startswith(f"module.{inside}") for key in absent):  # in an AveragedModel
        rank_zero_warn(
            "averages of the distillation losses' own parameters are in no checkpoint: they begin anew, while the "
            "averages of the module go on. Where you need them after a resume, train with DistillationModule"
        )


def join_optimizer(losses: AttachedLosses, optimizers: list[Optimizer]) -> None:
    """Let the parameters that no optimizer holds join one.

    A single optimizer takes them into its first group; of several, the one that trains the tapped layers does, into the
    group of these: the others' ``zero_grad`` and ``toggle_optimizer`` would keep them from ever being trained. Never a
    group of their own: schedulers count groups when they are made.

    Raises:
        ValueError: There is no optimizer, or it is not clear which one trains what is tapped.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    own = [(name, p) for name, p in losses.named_parameters() if p.requires_grad and id(p) not in held]
    if not own:
        return
    if not optimizers:
        raise ValueError(f"the losses have parameters, {own[0][0]} for one, but the module configures no optimizer")
    optimizer, number = (optimizers[0], 0) if len(optimizers) == 1 else _trains_the_taps(losses, optimizers)
    optimizer.param_groups[number]["params"].extend(p for _, p in own)
    which = "first parameter group" if number == 0 else f"parameter group {number}"
    rank_zero_info(
        f"{sum(p.numel() for _, p in own)} parameters of the distillation losses join the {which} of "
        f"{type(optimizer).__name__}"
    )


def _trains_the_taps(losses: AttachedLosses, optimizers: list[Optimizer]) -> tuple[Optimizer, int]:
    """The optimizer, and the number of its group, that holds the tapped layers' parameters.

    Where layers have none to train, what they lie in counts, short of the whole module.
    """
    (module,) = losses._module
    hooks = {n: get_hooks(m) for n, m in module.named_modules()}
    tapped = places = {n for n, on in hooks.items() if any(isinstance(hook, Hook) and hook.function for hook in on)}
    sizes: list[list[int]] = []
    while places and not any(map(any, sizes)):
        near = {id(p): p.numel() for place in places for p in module.get_submodule(place).parameters()}
        sizes = [[sum(near.get(id(p), 0) for p in g["params"]) for g in o.param_groups] for o in optimizers]
        places = {place.rpartition(".")[0] for place in places} - {""}
    training = [number for number, groups in enumerate(sizes) if any(groups)]
    if len(training) != 1:
        raise ValueError(
            f"the losses have parameters, and {len(training) or 'none'} of the module's {len(optimizers)} optimizers "
            f"train the tapped layers {sorted(tapped)}: let configure_optimizers give the parameters whose names begin "
            f"with {losses._address!r} to the one that steps on the distilled loss"
        )
    groups = sizes[training[0]]
    return optimizers[training[0]], groups.index(max(groups))


def losses_with_tensors(terms: Mapping[str, Term]) -> dict[str, nn.Module]:
    """The losses that have, or will have, parameters or buffers."""
    return {
        name: term.loss
        for name, term in terms.items()
        if term.loss.missing_sizes or [*term.loss.parameters(), *term.loss.buffers()]
    }
