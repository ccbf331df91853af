"""Losses with parameters or buffers as a submodule of a LightningModule during a fit."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_rkd.losses.weighting import Term


class AttachedLosses(nn.ModuleDict):
    """Losses that are trained, moved and synchronised with a module, but absent from its ``state_dict``."""

    def __init__(self, losses: dict[str, nn.Module]) -> None:
        super().__init__(losses)
        self.register_load_state_dict_post_hook(_ignore_missing_keys)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Empty state, since the callback saves the losses."""
        return {} if destination is None else destination

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """Become a submodule of a module, under an unused name; returns the function that undoes it."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            # memory shared by spawned ranks, of which each would write to it
            if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
                tensor.data = tensor.data.clone()
        number = 0
        while hasattr(module, name := f"_distillation_losses_{number}"):
            number += 1
        self._address = name
        module.add_module(name, self)

        def undo() -> None:
            if hasattr(module, name):
                delattr(module, name)

        return undo


def _ignore_missing_keys(losses: nn.Module, incompatible: Any) -> None:
    """Ignore that a module's checkpoint lacks the losses; warn if averages of their parameters are lost."""
    assert isinstance(losses, AttachedLosses)
    inside = f"{losses._address}."
    absent = [key for key in incompatible.missing_keys if inside in key]
    for key in absent:
        incompatible.missing_keys.remove(key)
    if any(key.startswith(f"module.{inside}") for key in absent):  # in an AveragedModel
        rank_zero_warn(
            "averages of the distillation losses' own parameters are in no checkpoint: they begin anew, while the "
            "averages of the module go on. To keep them after a resume, train with DistillationModule"
        )


def join_optimizer(
    losses: AttachedLosses, optimizers: list[Optimizer], module: nn.Module, layers: Sequence[nn.Module]
) -> None:
    """Add the losses' parameters that no optimizer holds to an optimizer.

    A single optimizer takes them into its first group. Of several, the one that trains the tapped layers takes them
    into the group of these layers: ``zero_grad`` and ``toggle_optimizer`` of the others would keep them from being
    trained. No group is added, because schedulers count the groups when they are created.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    own = [(name, p) for name, p in losses.named_parameters() if p.requires_grad and id(p) not in held]
    if not own:
        return
    if not optimizers:
        raise ValueError(f"the losses have parameters, {own[0][0]} for one, but the module configures no optimizer")
    optimizer, number = optimizers[0], 0
    if len(optimizers) > 1:
        tapped = {name for name, m in module.named_modules() if any(m is layer for layer in layers)}
        sizes = _count_trained(module, tapped, optimizers)
        training = [n for n, groups in enumerate(sizes) if any(groups)]
        if len(training) != 1:
            raise ValueError(
                f"the losses have parameters, and {len(training) or 'none'} of the module's {len(optimizers)} "
                f"optimizers train the tapped layers {sorted(tapped)}: let configure_optimizers give the parameters "
                f"whose names begin with {losses._address!r} to the one that steps on the distilled loss"
            )
        groups = sizes[training[0]]
        optimizer, number = optimizers[training[0]], groups.index(max(groups))
    optimizer.param_groups[number]["params"].extend(p for _, p in own)
    which = "first parameter group" if number == 0 else f"parameter group {number}"
    rank_zero_info(
        f"{sum(p.numel() for _, p in own)} parameters of the distillation losses join the {which} of "
        f"{type(optimizer).__name__}"
    )


def _count_trained(module: nn.Module, places: set[str], optimizers: list[Optimizer]) -> list[list[int]]:
    """Numbers of parameters of some layers, in each group of each optimizer.

    For layers without parameters, those of the modules around them count, except for the whole module.
    """
    sizes: list[list[int]] = []
    while places and not any(map(any, sizes)):
        near = {id(p): p.numel() for place in places for p in module.get_submodule(place).parameters()}
        sizes = [[sum(near.get(id(p), 0) for p in g["params"]) for g in o.param_groups] for o in optimizers]
        places = {place.rpartition(".")[0] for place in places} - {""}
    return sizes


def losses_with_tensors(terms: Mapping[str, Term]) -> dict[str, nn.Module]:
    """The losses that have parameters or buffers, or will have them once their sizes are known."""
    return {
        name: term.loss
        for name, term in terms.items()
        if term.loss.missing_sizes or [*term.loss.parameters(), *term.loss.buffers()]
    }
