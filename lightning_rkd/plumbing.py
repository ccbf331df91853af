"""What every LightningModule here does alike: plain hyper-parameters, numbered batches, a teacher handed back."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.parsing import collect_init_args

from lightning_rkd.data.indices import number_batches
from lightning_rkd.watch import refuse_broken_weights

try:  # only tells whether LightningCLI builds a module; private in Lightning
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
except ImportError:  # pragma: no cover
    _given_hyperparameters = None  # type: ignore[assignment]


class _HandBack(pl.Callback):
    """Lightning calls no ``teardown`` after an exception, and tells only callbacks about it.

    What a checkpoint must not hold is looked at here too: subclasses override ``on_save_checkpoint`` of a module.
    """

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Refuse weights that hold NaN."""
        refuse_broken_weights(pl_module, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Hand the teacher back as it was."""
        if hand_back := getattr(pl_module, "hand_back", None):
            hand_back()


def hand_back_after_exceptions(trainer: pl.Trainer) -> None:
    """Let the trainer call its module's ``hand_back`` after an exception."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
    if not any(isinstance(callback, _HandBack) for callback in callbacks):
        callbacks.insert(0, _HandBack())


def number_training_batches(trainer: pl.Trainer) -> Callable[[], None]:
    """Let the training loaders say which rows of the root data set their batches hold, wherever they come from.

    Returns the function that undoes it.
    """
    source = trainer.fit_loop._data_source
    plain = source.dataloader
    vars(source)["dataloader"] = lambda: number_batches(plain())

    def undo() -> None:
        vars(source).pop("dataloader", None)

    return undo


def save_plain_hyperparameters(module: pl.LightningModule, frame: FrameType | None) -> None:
    """Save those arguments of ``__init__``, of subclasses too, that are plain values: such checkpoints load safely.

    Under LightningCLI the hyper-parameters are the configuration: plain values, from which it rebuilds all parts.

    Args:
        module: What is being made.
        frame: Of its ``__init__``.
    """
    given: dict[str, Any] = {}
    if frame is not None and (_given_hyperparameters is None or _given_hyperparameters.get() is None):
        # as save_hyperparameters would collect them
        for arguments in collect_init_args(frame, [], classes=(pl.LightningModule,)):
            given |= arguments
    ignore = ["teacher", *(name for name, value in given.items() if not _is_plain(value))]
    module.save_hyperparameters(ignore=ignore, frame=frame)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
