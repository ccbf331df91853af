"""Lightning and DDP: hyper-parameters, indexed batches, refusals, and restoring the teacher after an exception."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_rkd.data.loaders import number_batches
from lightning_rkd.distillation.finite_checks import refuse_broken_weights
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.losses.weighting import Term
from lightning_rkd.utils.distributed import has_mesh
from lightning_rkd.utils.private import (
    collect_arguments,
    is_built_by_cli,
    is_copy_of_training_module,
    set_ddp_ignored,
    wrap_train_dataloader,
)


def exclude_from_ddp_broadcast(module: nn.Module) -> Callable[[], None]:
    """Exclude the buffers of stateful losses from DDP's broadcast: all ranks compute the same ones.

    Returns the function that undoes it.

    Example:
        >>> class Steps(StepState):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("count", torch.zeros(1))
        >>> host = nn.Sequential(nn.BatchNorm1d(2), Steps())
        >>> undo = exclude_from_ddp_broadcast(host)
        >>> host._ddp_params_and_buffers_to_ignore
        ['1.count']
    """
    inside = [(at, m) for at, m in module.named_modules() if isinstance(m, StepState)]
    own = {f"{at}.{name}" for at, m in inside for name, _ in m.named_buffers()}
    return set_ddp_ignored(module, sorted(own)) if own else lambda: None


def refuse_lbfgs(optimizers: Iterable[torch.optim.Optimizer], stateful_losses: Sequence[str]) -> None:
    """Refuse LBFGS with stateful losses: it evaluates a step several times, and each would change their memory.

    Raises:
        ValueError: There are both.
    """
    if stateful_losses and any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
        raise ValueError(
            f"the losses {list(stateful_losses)} remember every evaluation of a step, and LBFGS evaluates each several "
            "times: use another optimizer"
        )


def refuse_averages(callbacks: Iterable[Any], cure: str) -> None:
    """Refuse averaged weights that were copied before the losses' tensors joined the module.

    Weights are averaged tensor by tensor, in order: tensors that join later are left out, or shift the others.

    Raises:
        ValueError: One of the callbacks has copied the module for its averages already.
    """
    for callback in callbacks:
        if any(
            isinstance(value, AveragedModel) or is_copy_of_training_module(value) for value in vars(callback).values()
        ):
            raise ValueError(
                f"{type(callback).__name__} copied the module before all its losses' tensors were in it: {cure}"
            )


def refuse_unsynchronised(losses: Mapping[str, Term], strategy: Any, gather: bool) -> None:
    """Refuse losses whose parameters would differ between ranks under fully sharded training (FSDP2).

    FSDP2 synchronises the modules that were sharded, and nothing else. Other parameters stay alike on all ranks only
    where their gradient is the same on all, that of a loss that gets the rows of all ranks.

    Raises:
        ValueError: Ranks would train different parameters, or parts of parameters.
    """
    if not has_mesh(strategy):
        return
    from torch.distributed.fsdp import FSDPModule

    for name, term in losses.items():
        own = [p for p in term.loss.parameters() if p.requires_grad]
        alike = gather and term.loss.gather and not any(hasattr(p, "full_tensor") for p in own)
        if own and not alike and not isinstance(term.loss, FSDPModule):
            raise ValueError(
                f"{name}: under {type(strategy).__name__} every rank would train its own parameters of "
                f"{type(term.loss).__name__}: train with strategy='ddp'; or use DistillationModule, and in its "
                "configure_model shard the loss by itself, before anything around it: fully_shard(loss, mesh=...)"
            )


class _RestoreAfterException(pl.Callback):
    """Restores a module's teacher after an exception, when Lightning calls callbacks only and no ``teardown``.

    It also keeps NaN out of checkpoints: subclasses of a module override its ``on_save_checkpoint``.
    """

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Refuse weights that hold NaN."""
        refuse_broken_weights(pl_module, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the teacher."""
        if restore := getattr(pl_module, "restore", None):
            restore()


def restore_after_exceptions(trainer: pl.Trainer) -> None:
    """Let the trainer call its module's ``restore`` after an exception."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
    if not any(isinstance(callback, _RestoreAfterException) for callback in callbacks):
        callbacks.insert(0, _RestoreAfterException())


def number_training_batches(trainer: pl.Trainer) -> Callable[[], None]:
    """Let the training loaders yield batches with the indices of their samples in the root data set.

    Returns the function that undoes it.
    """
    return wrap_train_dataloader(trainer, number_batches)


def save_plain_hyperparameters(module: pl.LightningModule, frame: FrameType | None) -> None:
    """Save those arguments of ``__init__``, of subclasses too, that are plain values: such checkpoints load safely.

    Under LightningCLI the hyper-parameters are the configuration: plain values, from which it rebuilds all parts.

    Args:
        module: The module.
        frame: Frame of its ``__init__``.
    """
    given: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if frame is not None and not is_built_by_cli():
        for own in collect_arguments(frame, pl.LightningModule):  # from the base class to that of the module
            given |= own
    ignore = {"teacher", *(name for name, value in given.items() if not _is_plain(value))}
    if inspect.getfullargspec(type(module).__init__).varkw:  # which would be passed, on loading, what it sets itself
        ignore |= given.keys() - own.keys()
    module.save_hyperparameters(ignore=list(ignore), frame=frame)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
