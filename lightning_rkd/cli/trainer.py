"""LightningCLI for this library: the commands ``fit``, ``validate``, ``test`` and ``predict``, and the experiments."""

import difflib
import io
import os
import re
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lightning_rkd.cli.signals import forward_sigterm
from lightning_rkd.data.loaders import list_loaders
from lightning_rkd.utils.distributed import gather_objects, run_on_all_ranks
from lightning_rkd.utils.files import check_file, write_whole
from lightning_rkd.utils.private import replaces_samplers


class TrainingCLI(LightningCLI):
    """LightningCLI with short names of classes, complete checkpoints, and errors as exceptions.

    The ``checkpoint`` group configures one ``ModelCheckpoint``, which writes ``last.ckpt`` into
    ``trainer.default_root_dir`` after every epoch, and ``best.ckpt`` if a ``monitor`` is named, unless the trainer has
    its own or ``enable_checkpointing`` is false. A checkpoint does not replace the configuration. The saved
    configuration does not mention ``callbacks`` and ``**trainer``, further arguments of the trainer.
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
        self._known = import_public_classes()
        self._unsaved = trainer
        super().__init__(
            save_config_callback=_AtomicConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "callbacks": list(callbacks)},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, **({"prog": prog} if prog else {})},
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
        """Parse the command line or a dict, and shorten jsonargparse's messages to what the user can correct."""
        try:
            if args is None or isinstance(args, list):
                self.config = parser.parse_args(args)
            else:
                self.config = parser.parse_object(args)
        except ArgumentError as error:
            error.message = _shorten(error.message)
            unknown = re.search(r"Expected a dot import path string: (\w+)$", error.message, re.MULTILINE)
            if unknown and (near := difflib.get_close_matches(unknown[1], self._known, n=1)):
                place = ".".join(re.findall(r'Parser key "([\w.]+)"', error.message))
                error.message = f"{place}: there is no class {unknown[1]!r}; did you mean {near[0]!r}?"
            raise

    def instantiate_classes(self) -> None:
        """Build everything, with the message of a class that refuses its arguments without the whole configuration."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Given value" not in str(error):
                raise
            raise ValueError(_shorten(str(error)).strip(" -")) from error

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration, which Lightning would replace by the checkpoint's without a message."""

    def before_instantiate_classes(self) -> None:
        """Refuse checkpoints that cannot be read and folders that cannot be written; give best and last two names."""
        settings = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        path, folder = settings.get("ckpt_path"), Path(settings.trainer.default_root_dir or Path.cwd())
        last = folder / "last.ckpt"
        requeued = "hpc" if SLURMEnvironment.detect() else ""
        self._sought = {"last": "last*.ckpt", "hpc": "hpc_ckpt_*.ckpt"}.get(path or requeued, "")
        if path == "last" and last.is_file():
            path = str(last)
        if not path or path in ("best", "last", "hpc") or path.startswith("registry") or "://" in path:
            path = None  # Lightning finds it
        self._check = partial(_check_files, folder, path, safe=settings.get("weights_only") is not False)
        if settings.trainer.num_nodes == 1:
            self._check()
        checkpoint = settings.checkpoint
        if checkpoint.monitor is not None and checkpoint.filename == "last":
            checkpoint.filename, checkpoint.save_last = "best", True

    def before_fit(self) -> None:
        """Warn if Lightning cannot resume exactly."""
        if self.config_init[self.subcommand].get("ckpt_path") and self.trainer.max_steps != -1:
            warnings.warn(
                "a run that is limited by max_steps does not resume exactly: Lightning trains one batch too many after "
                "the end of an epoch. Limit runs by max_epochs to resume them bit for bit",
                stacklevel=1,
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, without the checkpoint group if checkpoints are off or the trainer has its own."""
        settings = self._get(self.config_init, "trainer")
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if settings.get("enable_checkpointing") is False or any(isinstance(c, ModelCheckpoint) for c in given):
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        trainer = super().instantiate_trainer(**{**kwargs, **self._unsaved})
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        forward_sigterm(trainer)
        trainer.callbacks.append(_RowsPerRank())  # type: ignore[attr-defined] # set later
        if trainer.num_nodes > 1:
            trainer.callbacks.insert(0, _CheckAllMachines(self._check, self._sought))  # type: ignore[attr-defined] # set later
        return trainer


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or absent: ``Trainer(plugins=[WholeCheckpointIO()])``.

    Lightning moves the file from the system's temporary folder, which is a copy if that is on another disk: a run that
    is killed meanwhile loses the old checkpoint and the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the old file, and replace it when all of the new one has reached the disk."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Verify the checksums, then load."""
        if Path(path).is_file():
            check_file(path)
        return super().load_checkpoint(path, *args, **kwargs)


class _AtomicConfig(SaveConfigCallback):
    """Writes the configuration under another name first, so that a kill cannot truncate it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        name = self.config_filename
        self.config_filename = f".{name}.part"
        super().setup(trainer, pl_module, stage)
        self.config_filename = name
        part = Path(trainer.log_dir or ".", f".{name}.part")  # log_dir is a collective
        if trainer.is_global_zero and part.exists():
            part.replace(part.with_name(name))


class _RowsPerRank(pl.Callback):
    """Refuses training loaders that give all ranks the same rows."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1 or replaces_samplers(trainer):
            return
        for loader in list_loaders(trainer.train_dataloader):
            plain = type(getattr(loader, "batch_sampler", None)) is BatchSampler
            if plain and isinstance(loader.sampler, RandomSampler | SequentialSampler):
                raise ValueError(
                    f"all {trainer.world_size} devices would train on the same rows, because this training loader has "
                    "no distributed sampler. Let Lightning add one, --trainer.use_distributed_sampler=true, or use a "
                    "distributed batch sampler such as PKBatchSampler"
                )


class _CheckAllMachines(pl.Callback):
    """Checks files after the machines have joined; an error on one before that would leave the others waiting."""

    def __init__(self, check: Callable[[], None], sought: str) -> None:
        self.check, self.sought = check, sought

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        run_on_all_ranks(self.check)
        folder = Path(trainer.default_root_dir)
        every = gather_objects(sorted(path.name for path in folder.glob(self.sought)) if self.sought else [])
        if any(found != every[0] for found in every):
            has = "; ".join(f"rank {rank}: {', '.join(found) or 'none'}" for rank, found in enumerate(every))
            raise ValueError(
                f"the machines do not find the same checkpoints to resume from in {str(folder)!r} ({has}): copy them "
                "from the machine of rank 0, which writes them, or use a folder that the machines share"
            )


def _check_files(folder: Path, checkpoint: str | None, safe: bool) -> None:
    if checkpoint is not None:
        check_checkpoint(checkpoint, safe)
    check_writable(folder)


def check_checkpoint(path: str | os.PathLike[str], safe: bool = True) -> None:
    """Verify the checksums of a checkpoint and, if ``safe``, that it holds nothing but tensors and plain values."""
    if not Path(path).exists():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist")
    if not Path(path).is_file():
        return  # sharded checkpoints are folders
    check_file(path)
    if safe:
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{str(path)!r} is no checkpoint that can be read safely ({reason})") from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create a folder if it does not exist, and verify that files can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the output folder {str(folder)!r} cannot be written: {error.strerror or error}") from error


def _shorten(message: str) -> str:
    """A message of jsonargparse without what is no mistake of the user's, and without the values of all arguments."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    return "\n".join(line for line in message.splitlines() if not line.strip().startswith(noise))


def import_public_classes() -> list[str]:
    """Import what configurations may call by a short name, and return the names of this package and its plugins.

    jsonargparse finds the classes that are loaded.
    """
    import pytorch_metric_learning.losses
    import pytorch_metric_learning.miners  # noqa: F401

    names: list[str] = []
    for package in ("", ".data", ".experimental", ".losses", ".metrics", ".models", ".modules"):
        module = import_module(f"lightning_rkd{package}")
        for name in module.__all__:
            getattr(module, name)
        names += module.__all__
    return [*names, *(loss.__name__ for loss in load_registered_losses().values())]


def load_registered_losses() -> dict[str, type[Any]]:
    """Losses that other packages register as entry points, by their names."""
    found: dict[str, type[Any]] = {}
    for loss in entry_points(group="lightning_rkd.losses"):
        try:
            found[loss.name] = loss.load()
        except Exception as error:  # another package may raise anything
            raise ImportError(
                f"the loss {loss.name!r} of the installed package {loss.dist.name if loss.dist else '?'} cannot be "
                f"imported: {error!r}; repair or uninstall that package"
            ) from error
    return found
