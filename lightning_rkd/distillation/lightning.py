"""Lightning and DDP: preparation of a fit, evaluation, checks of the trainer, hyper-parameters."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.evaluation import Evaluation
from lightning_rkd.distillation.finite_checks import refuse_broken_weights
from lightning_rkd.distillation.gradient_balance import GradientBalance
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.utils.distributed import data_parallel_group, has_mesh
from lightning_rkd.utils.private import (
    collect_arguments,
    is_built_by_cli,
    is_copy_of_training_module,
    load_dataloaders,
    set_ddp_ignored,
)
from lightning_rkd.utils.types import Batch


def lightning_base(module: nn.Module) -> type[Any]:
    """The class ``LightningModule`` of a module, of ``lightning`` or of ``pytorch_lightning``."""
    return next(base for base in type(module).__mro__ if base.__name__ == "LightningModule")


def configure_model(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Call the module's ``configure_model``, which Lightning does only after callbacks' ``setup``; twice is allowed."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
        module.configure_model()


def prepare_teacher(distiller: Distiller, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Move the teacher of an attached distiller to the device and precision of a module."""
    distiller.prepare(module.device, trainer.precision_plugin.convert_module, data_parallel_group(trainer.strategy))


def prepare_fit(
    distiller: Distiller, trainer: pl.Trainer, module: pl.LightningModule, unpack: Callable[[Any], Batch]
) -> None:
    """Prepare the teacher of an attached distiller, and let it check or read the training data if it must."""
    prepare_teacher(distiller, trainer, module)
    if distiller.teacher_needs_data:
        with isolate_rng(include_cuda=False):
            distiller.prepare_data(load_dataloaders(trainer), unpack)


def apply_balance(
    gradients: GradientBalance,
    terms: dict[str, Tensor],
    task: Tensor,
    features: StepFeatures,
    distiller: Distiller,
    module: pl.LightningModule,
    *,
    logs: bool,
) -> None:
    """Balance the terms of a step in place, compare their gradients if that is due in a logged step, and log both."""
    trainer, epoch, step = module.trainer, module.current_epoch, module.global_step
    compare = logs and gradients.is_due(step, epoch) and has_local_backward(trainer.strategy)
    if gradients.balance is None and not compare:
        return
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = None if scaler is None else scaler.scale
    found = gradients.apply(terms, task, features, distiller, epoch=epoch, step=step, scale=scale, compare=compare)
    weights = {name: value for name, value in found.items() if name.startswith("balance/")}
    module.log_dict(weights, on_step=True, on_epoch=False, batch_size=1)
    # Lightning repeats a value of a step in later steps of the epoch, so that one is logged for the epoch instead
    each = gradients.compare == "step"
    norms = {name: value for name, value in found.items() if name not in weights}
    module.log_dict(norms, on_step=each, on_epoch=not each, batch_size=1)


def has_local_backward(strategy: Any) -> bool:
    """True if a backward pass from a loss to features runs nothing of the strategy (one device, DDP)."""
    names = {base.__name__ for base in type(strategy).__mro__}  # of lightning or of pytorch_lightning
    return not names.isdisjoint({"SingleDeviceStrategy", "DDPStrategy"}) and "DeepSpeedStrategy" not in names


def start_evaluation(
    metrics: Mapping[str, Metric],
    trainer: pl.Trainer,
    module: pl.LightningModule,
    distiller: Distiller,
    losses: Sequence[RelationalLoss],
    unpack: Callable[[Any], Batch],
) -> Evaluation:
    """Start with empty metrics for the validation or test that begins, and prepare the teacher of the distiller."""
    if distiller.teacher is not None:
        prepare_teacher(distiller, trainer, module)
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    evaluation = Evaluation(metrics, loaders, trainer.world_size, module.device, losses)
    if distiller.teacher_needs_data and evaluation.uses_teacher():
        distiller.prepare_data(loaders, unpack, train=False)
    return evaluation


def log_evaluation(evaluation: Evaluation, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Log ``val/<metric>`` or ``test/<metric>`` and empty the metrics; a sanity check logs nothing."""
    if not trainer.sanity_checking:  # a few batches may be too few for a value
        for values in evaluation.values("test" if trainer.testing else "val"):
            module.log_dict(values, sync_dist=True, add_dataloader_idx=False)
    evaluation.reset()


def exclude_from_ddp_broadcast(module: nn.Module) -> Callable[[], None]:
    """Exclude the buffers of stateful losses from DDP's broadcast, which all ranks compute alike; returns the undo."""
    inside = [(at, m) for at, m in module.named_modules() if isinstance(m, StepState)]
    own = {f"{at}.{name}" for at, m in inside for name, _ in m.named_buffers()}
    return set_ddp_ignored(module, sorted(own)) if own else lambda: None


def refuse_lbfgs(optimizers: Iterable[torch.optim.Optimizer], stateful_losses: Sequence[str]) -> None:
    """Refuse LBFGS with stateful losses: it evaluates a step several times, and each evaluation changes their state."""
    if stateful_losses and any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
        raise ValueError(
            f"the losses {list(stateful_losses)} remember every evaluation of a step, and LBFGS evaluates each several "
            "times: use another optimizer"
        )


def refuse_averages(callbacks: Iterable[Any], cure: str) -> None:
    """Refuse callbacks that copied the module for averaged weights before the losses' tensors joined it.

    Weights are averaged tensor by tensor, in order: tensors that join later would be left out, or shift the others.
    """
    for callback in callbacks:
        if any(isinstance(x, AveragedModel) or is_copy_of_training_module(x) for x in vars(callback).values()):
            raise ValueError(
                f"{type(callback).__name__} copied the module before all its losses' tensors were in it: {cure}"
            )


def refuse_unsynchronised(distiller: Distiller, strategy: Any) -> None:
    """Refuse losses whose parameters would differ between ranks under fully sharded training (FSDP2).

    FSDP2 synchronises only modules that were sharded. Other parameters stay equal on all ranks only if their gradient
    is the same on all, which holds for a loss that receives the rows of all ranks.
    """
    if not has_mesh(strategy):
        return
    from torch.distributed.fsdp import FSDPModule

    for name, term in distiller.losses.items():
        own = [p for p in term.loss.parameters() if p.requires_grad]
        equal = distiller.gather and term.loss.gather and not any(hasattr(p, "full_tensor") for p in own)
        if own and not equal and not isinstance(term.loss, FSDPModule):
            raise ValueError(
                f"{name}: under {type(strategy).__name__} every rank would train its own parameters of "
                f"{type(term.loss).__name__}: train with strategy='ddp'; or use DistillationModule, and in its "
                "configure_model shard the loss by itself, before anything around it: fully_shard(loss, mesh=...)"
            )


def refuse_balance(gradients: GradientBalance, strategy: Any) -> None:
    """Refuse ``balance`` under strategies that do not support a second backward pass (FSDP1, DeepSpeed)."""
    if gradients.balance is not None and not (has_local_backward(strategy) or has_mesh(strategy)):
        raise ValueError(
            f"balance takes gradients in a backward pass of its own, which {type(strategy).__name__} does not support: "
            "train with strategy='ddp' or ModelParallelStrategy (FSDP2), or set weights by hand"
        )


class _RestoreAfterException(pl.Callback):
    """Restores a module's teacher after an exception, when Lightning calls callbacks but not ``teardown``.

    It also keeps NaN out of checkpoints, also where a subclass of a module overrides ``on_save_checkpoint``.
    """

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Refuse weights that hold NaN."""
        refuse_broken_weights(pl_module, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the teacher."""
        if restore := getattr(pl_module, "restore", None):
            restore()


def restore_after_exceptions(trainer: pl.Trainer) -> None:
    """Make a trainer call ``restore`` of its module after an exception."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
    if not any(isinstance(callback, _RestoreAfterException) for callback in callbacks):
        callbacks.insert(0, _RestoreAfterException())


def save_plain_hyperparameters(module: pl.LightningModule, frame: FrameType | None) -> None:
    """Save the arguments of ``__init__``, of subclasses too, that are plain values, so that checkpoints load safely.

    Under LightningCLI the hyper-parameters are the configuration, which holds plain values only.
    """
    given: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if frame is not None and not is_built_by_cli():
        for own in collect_arguments(frame, lightning_base(module)):  # from the base class to that of the module
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
