"""What a Trainer must respect where losses with tensors of their own live inside a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_rkd.distributed import has_mesh
from lightning_rkd.losses.base import Term
from lightning_rkd.losses.parts.state import StepState


def keep_from_ddp(module: nn.Module) -> Callable[[], None]:
    """Tell DDP not to broadcast what losses inside a module remember from step to step: all ranks hold the same.

    Returns the function that takes the notice off again.

    Example:
        >>> class Steps(StepState):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("count", torch.zeros(1))
        >>> host = nn.Sequential(nn.BatchNorm1d(2), Steps())
        >>> undo = keep_from_ddp(host)
        >>> host._ddp_params_and_buffers_to_ignore
        ['1.count']
    """
    notice = "_ddp_params_and_buffers_to_ignore"  # DDP's own name
    inside = [(at, m) for at, m in module.named_modules() if isinstance(m, StepState)]
    own = {f"{at}.{name}" for at, m in inside for name, _ in m.named_buffers()}
    before = vars(module).get(notice)
    if own:
        vars(module)[notice] = sorted(own.union(before or ()))

    def undo() -> None:
        if before is None:
            vars(module).pop(notice, None)
        else:
            vars(module)[notice] = before

    return undo


def refuse_lbfgs(optimizers: Iterable[torch.optim.Optimizer], banks: Sequence[str]) -> None:
    """An optimizer that evaluates a step several times would change a memory as often.

    Raises:
        ValueError: There are both.
    """
    if banks and any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
        raise ValueError(
            f"the losses {list(banks)} remember every evaluation of a step, and LBFGS evaluates each several times: "
            "use another optimizer"
        )


def refuse_averages(callbacks: Iterable[Any], cure: str) -> None:
    """Weights are averaged tensor by tensor, in order: what joins the module after it was copied is left out, or shifts
    the others.

    Raises:
        ValueError: One of the callbacks has copied the module for its averages already.
    """
    for callback in callbacks:
        if any(isinstance(value, AveragedModel) or _is_copy(value) for value in vars(callback).values()):
            raise ValueError(
                f"{type(callback).__name__} copied the module before all its losses' tensors were in it: {cure}"
            )


def _is_copy(value: Any) -> bool:
    """Lightning notes in its module which hook is running: a copy made in a hook keeps the note, but not the trainer.

    So the module that trains is told from its copies, and these from a network that a callback was given.
    """
    if not isinstance(value, nn.Module):
        return False
    notes = vars(value)
    return notes.get("_current_fx_name") is not None and notes.get("_trainer") is None


def refuse_unsynchronised(losses: Mapping[str, Term], strategy: Any, gather: bool) -> None:
    """Fully sharded training (FSDP2) synchronises the modules that were sharded one by one, and nothing else.

    Parameters that are not sharded stay alike on all ranks only where their gradient is the same on all ranks, that of
    a loss that sees the rows of all.

    Raises:
        ValueError: Ranks would train different parameters, or parts of parameters.
    """
    if not has_mesh(strategy):
        return
    from torch.distributed.fsdp import FSDPModule

    for name, term in losses.items():
        own = [p for p in term.loss.parameters() if p.requires_grad]
        alike = gather and term.across_samples and not any(hasattr(p, "full_tensor") for p in own)
        if own and not alike and not isinstance(term.loss, FSDPModule):
            raise ValueError(
                f"{name}: under {type(strategy).__name__} every rank would train its own parameters of "
                f"{type(term.loss).__name__}: train with strategy='ddp'; or use DistillationModule, and in its "
                "configure_model shard the loss by itself, before anything around it: fully_shard(loss, mesh=...)"
            )
