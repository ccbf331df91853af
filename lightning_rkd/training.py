"""LightningCLI with this project's habits: what the command line and the studies train through."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_rkd.teachers import check_file


class TrainingCLI(LightningCLI):
    """Any model and any data by class path or short name, checkpoints beside the run, and errors as exceptions.

    Differences from Lightning's own: ``seed_everything`` is 0; Lightning puts no distributed sampler of its own over
    :class:`~lightning_rkd.data.sampling.PKBatchSampler`; the ``checkpoint`` group configures one ``ModelCheckpoint``
    that writes ``last.ckpt`` into ``trainer.default_root_dir`` after every epoch, and ``best.ckpt`` where a ``monitor``
    is named, unless the trainer has its own or ``enable_checkpointing`` is false; a checkpoint is verified before it is
    read; an output folder that cannot be written is refused before training.

    Args:
        args: What would stand on the command line, or a configuration as a dict; ``None`` reads ``sys.argv``.
        run: Whether there are subcommands, one of which is run. ``False`` builds ``model``, ``datamodule`` and
            ``trainer``.
        prog: Name of the program in help texts.
        callbacks: Callbacks that the saved configuration does not mention.
        **trainer: Arguments of the trainer that the saved configuration does not mention.

    Raises:
        argparse.ArgumentError: The configuration does not fit; the message says where.
    """

    def __init__(
        self,
        args: ArgsType = None,
        *,
        run: bool = True,
        prog: str | None = None,
        callbacks: Sequence[pl.Callback] = (),
        **trainer: Any,
    ) -> None:
        import_public_classes()
        self._unsaved = trainer
        super().__init__(
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "callbacks": list(callbacks)},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, **({"prog": prog} if prog else {})},
            args=args,
            run=run,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``checkpoint`` group."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,  # a second run would write last-v1.ckpt
                "checkpoint.auto_insert_metric_name": False,  # a metric's name holds a slash
            }
        )
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; arguments may be given while the program has its own."""
        self.config = parser.parse_args(args) if args is None or isinstance(args, list) else parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """Verify the checkpoint, before Lightning reads the model's configuration from it."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and path not in ("best", "last", "hpc", "registry") and "://" not in path:
            if not Path(path).exists():
                raise FileNotFoundError(f"the checkpoint {path!r} does not exist")
            if Path(path).is_file():
                check_file(path)
        try:
            super()._parse_ckpt_path()
        except (pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path!r} is no checkpoint that can be read safely ({reason})") from error

    def before_instantiate_classes(self) -> None:
        """Refuse an output folder that cannot be written, and keep best and last checkpoint apart."""
        folder = self._get(self.config, "trainer").get("default_root_dir")
        check_writable(folder or Path.cwd())
        checkpoint = self._get(self.config, "checkpoint")
        if checkpoint.monitor is not None and checkpoint.filename == "last":
            checkpoint.filename, checkpoint.save_last = "best", True

    def before_fit(self) -> None:
        """Say where Lightning cannot resume exactly."""
        if self.config_init[self.subcommand].get("ckpt_path") and self.trainer.max_steps != -1:
            warnings.warn(
                "a run that is limited by max_steps does not resume exactly: Lightning trains one batch too many after "
                "the end of an epoch. Limit runs by max_epochs to resume them bit for bit",
                stacklevel=1,
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; the checkpoint group steps aside where checkpoints are off or have been set up already."""
        settings = self._get(self.config_init, "trainer")
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if settings.get("enable_checkpointing") is False or any(isinstance(c, ModelCheckpoint) for c in given):
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        return super().instantiate_trainer(**{**kwargs, **self._unsaved})


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make the folder if it does not exist, and write and remove a file in it.

    Raises:
        OSError: That failed; the message names the folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the output folder {str(folder)!r} cannot be written: {error.strerror or error}") from error


def import_public_classes() -> None:
    """Import what configurations may call by a short name; jsonargparse finds the classes that are loaded."""
    import pytorch_metric_learning.losses
    import pytorch_metric_learning.miners  # noqa: F401

    import lightning_rkd
    import lightning_rkd.data
    import lightning_rkd.models

    for package in (lightning_rkd, lightning_rkd.data, lightning_rkd.models):
        for name in package.__all__:
            getattr(package, name)
