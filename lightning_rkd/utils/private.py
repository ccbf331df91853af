"""Private names of PyTorch and Lightning that the package uses, each with the reason and what would replace it.

``tests/utils/test_private.py`` uses every one of them, so that a release that changes one breaks there first. Lightning
is imported where it is needed: losses and metrics work without it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn
from torch._compile import _disable_dynamo

# Trees of tensors. torch.utils.pytree replaces it once the oldest supported release of PyTorch has it.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

if TYPE_CHECKING:
    import lightning.pytorch as pl

Function = TypeVar("Function", bound=Callable[..., Any])

OVERRIDDEN = {
    # Moves and casts parameters and buffers: losses stay in float32, counters on the host, metrics' integers integers.
    "torch.nn.Module": ("_apply", "_load_from_state_dict"),
    "torchmetrics.Metric": ("_apply",),
    # Replaces the configuration by the one in the checkpoint; the option --weights_only may make it public.
    "lightning.pytorch.cli.LightningCLI": ("_parse_ckpt_path", "_get", "_parser"),
}
"""Private methods that classes of this package override or call on themselves."""


def disable_compilation(function: Function) -> Function:
    """Run a function outside of compiled graphs.

    ``torch.compiler.disable`` replaces it once it no longer imports the whole compiler on the spot (seconds).
    """
    return cast(Function, _disable_dynamo(function))


count_writes: Callable[[Tensor], int] = attrgetter("_version")
"""Number of writes to a tensor: autograd's own counter, which has no public name."""


def list_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """Forward hooks of a module itself by the ``id`` of their handle, for which PyTorch has no public iterator."""
    return [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]


def get_slots(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers of a module itself, ``None`` entries included, which no public iterator yields."""
    return dict(module._parameters), dict(module._buffers)


def set_slots(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Put parameters and buffers back; ``setattr`` would refuse what quantised and parametrised layers hold."""
    module._parameters.update(parameters)
    module._buffers.update(buffers)


def set_ddp_ignored(module: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Add names to the parameters and buffers that DistributedDataParallel neither reduces nor broadcasts.

    DDP reads the attribute; its own setter is private too and replaces earlier names. Returns the function that undoes
    it.
    """
    attribute = "_ddp_params_and_buffers_to_ignore"
    before = vars(module).get(attribute)
    vars(module)[attribute] = sorted({*names, *(before or ())})

    def undo() -> None:
        if before is None:
            vars(module).pop(attribute, None)
        else:
            vars(module)[attribute] = before

    return undo


def load_dataloaders(trainer: pl.Trainer, stage: str = "fit") -> Any:
    """The loaders of a stage before its loop has set them up, when ``trainer.train_dataloader`` is still ``None``.

    A public way to load data in ``setup`` would replace it.
    """
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    return loops[stage]._data_source.dataloader()


def wrap_train_dataloader(trainer: pl.Trainer, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Pass the training loaders through a function, wherever they come from; returns the function that undoes it.

    A hook of Lightning between ``train_dataloader`` and the loop would replace it.
    """
    source: Any = trainer.fit_loop._data_source
    plain = source.dataloader
    vars(source)["dataloader"] = lambda: wrap(plain())

    def undo() -> None:
        vars(source).pop("dataloader", None)

    return undo


writes_logs: Callable[[pl.Trainer], bool] = attrgetter("_logger_connector.should_update_logs")
"""True if Lightning writes this step's values to loggers; ``log_every_n_steps`` is public, its count is not."""


def is_built_by_cli() -> bool:
    """True if LightningCLI is instantiating a module, whose hyper-parameters are then its configuration."""
    mixins = ("lightning.pytorch.core.mixins.hparams_mixin", "pytorch_lightning.core.mixins.hparams_mixin")
    return any(sys.modules[m]._given_hyperparameters.get() is not None for m in mixins if m in sys.modules)


def collect_arguments(frame: FrameType, base: type[Any]) -> list[dict[str, Any]]:
    """The arguments of a module's ``__init__``, then of its subclasses, as ``save_hyperparameters`` collects them."""
    from lightning.pytorch.utilities.parsing import collect_init_args

    return collect_init_args(frame, [], classes=(base,))


def is_copy_of_training_module(value: Any) -> bool:
    """True if it is a copy of the module that trains.

    Lightning notes in its module which hook is running; a copy made in a hook keeps the note, but not the trainer.
    There is no public way to tell such a copy.
    """
    attributes = vars(value) if isinstance(value, nn.Module) else {}
    return attributes.get("_current_fx_name") is not None and attributes.get("_trainer") is None


def replaces_samplers(trainer: pl.Trainer) -> bool:
    """True if Lightning replaces samplers by distributed ones in this run, which the Trainer keeps private."""
    connector = trainer._accelerator_connector
    return bool(connector.is_distributed and connector.use_distributed_sampler)


def set_sigterm_handler(trainer: pl.Trainer, handler: Callable[[int, FrameType | None], None]) -> Any:
    """Replace Lightning's own SIGTERM handler, which waits for other ranks; returns the object that notes the signal.

    An argument of the Trainer for signal handlers would replace it.
    """
    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = handler  # type: ignore[assignment, method-assign]
    return connector


def import_pytorch_lightning() -> Any:
    """Import ``pytorch_lightning`` without its notices; it would also send the messages of ``lightning`` elsewhere."""
    import lightning_utilities.core.rank_zero as messages

    log = messages.log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in notebooks tqdm looks for widgets
        import pytorch_lightning
    messages.log = log
    return pytorch_lightning
