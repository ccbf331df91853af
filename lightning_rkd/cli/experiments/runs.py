"""Runs that are trained, measured, kept and resumed: configurations of ``lightning-rkd fit``, each with a seed."""

import hashlib
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.cli.experiments.settings import Config, with_settings
from lightning_rkd.cli.trainer import TrainingCLI
from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.indexing import IndexedBatch
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.files import check_file, write_whole

RESULT = "result.pt"
"""File that a finished run leaves beside its checkpoint."""

_SIGNATURE = "run"  # entry of checkpoints and results that says which run they belong to
_ORDER = ("seed", "classes_per_batch", "samples_per_class", "batches_per_epoch", "eval_batch_size", "num_workers")


@dataclass
class Run:
    """A trained and measured network: training time, scores, digest of the weights, and date, hardware and commit."""

    parameters: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    weights: str = ""
    about: dict[str, str] = field(default_factory=dict)


Split = Literal["test", "validation"]

_images: dict[str, LabelledImages] = {}
"""The images that were loaded last, for the next run in this process that reads the same data."""


def prepare(config: Config, folder: Path, seed: int, callbacks: Sequence[pl.Callback] = ()) -> TrainingCLI:
    """Build ``.model``, ``.datamodule`` and ``.trainer`` of a configuration, without validation or logger.

    Its seeds and output folder are replaced; the callbacks are not saved with it.
    """
    settings = {"seed_everything": seed, "data.init_args.seed": seed, "trainer.default_root_dir": str(folder)}
    with _quiet():
        cli = TrainingCLI(
            with_settings(config, settings),
            run=False,
            callbacks=callbacks,
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    if isinstance(cli.datamodule, ImageDataModule):
        _share_images(cli.datamodule, config["data"])
    return cli


def _share_images(data: ImageDataModule, config: Config) -> None:
    arguments = {name: value for name, value in config.get("init_args", {}).items() if name not in _ORDER}
    key, load = json.dumps({**config, "init_args": arguments}, sort_keys=True, default=str), data.load

    def load_once() -> LabelledImages:
        if key not in _images:
            _images.clear()  # two data sets may not fit into memory
            _images[key] = load()
        return _images[key]

    data.load = load_once  # type: ignore[method-assign]


def train(
    config: Config, folder: Path, seed: int, callbacks: Sequence[pl.Callback] = (), resume: Path | None = None
) -> tuple[DistillationModule, ImageDataModule, float]:
    """Train a configuration (see :func:`prepare`); return the module, its data and the training time in seconds."""
    cli = prepare(config, folder, seed, callbacks)
    with _quiet():
        start = time.perf_counter()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    return cli.model, cli.datamodule, time.perf_counter() - start


def _measure(module: DistillationModule, data: ImageDataModule, split: Split) -> dict[str, float]:
    """Scores of the module's metrics on one part of the data; the other part is not read."""
    module.trainer.limit_val_batches = 1.0  # training ran without validation
    evaluate = module.trainer.test if split == "test" else module.trainer.validate
    found = evaluate(module, datamodule=data, verbose=False)
    return {name.removeprefix("test/").removeprefix("val/"): float(x) for part in found for name, x in part.items()}


def run(
    config: Config,
    folder: Path,
    seed: int,
    teacher: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    *,
    split: Split = "test",
    paths: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> Run:
    """Train and measure a network, or resume the same run where it was interrupted.

    The folder keeps the resolved configuration, the checkpoint and the result, which carry the settings that they
    belong to; those of other settings are replaced. ``teacher`` is ``weights`` of the teacher's run; ``paths`` are
    further settings that name files without changing what is computed; ``about`` is kept with the result.
    """
    identity = identify(config, seed, teacher)
    if (found := read_finished(folder, identity)) is not None:
        return found
    begun = _read_if_same(folder / "last.ckpt", identity)
    before, resume = (0.0, None) if begun is None else (begun[_SIGNATURE]["seconds"], folder / "last.ckpt")
    callbacks = [*callbacks, _Signature(identity, before)]
    module, data, seconds = train(with_settings(config, paths or {}), folder, seed, callbacks, resume)
    with _quiet():
        scores = _measure(module, data, split)
    parameters, weights = count_parameters(module.student), digest(*module.student.state_dict().values())
    found = Run(parameters, before + seconds, scores, weights, dict(about or {}))
    content = io.BytesIO()
    torch.save({_SIGNATURE: {"identity": identity}, **asdict(found)}, content)
    write_whole(folder / RESULT, content.getbuffer())
    return found


def read_finished(folder: Path, identity: str) -> Run | None:
    """The finished run of that identity in a folder; a damaged file is a ``ValueError``."""
    kept = _read_if_same(folder / RESULT, identity)
    return None if kept is None else Run(**{name: value for name, value in kept.items() if name != _SIGNATURE})


def identify(config: Config, seed: int, teacher: str | None) -> str:
    """Everything that the result of a run depends on, as text."""
    from lightning_rkd import __version__

    versions = {"lightning_rkd": __version__, "torch": str(torch.__version__)}
    return json.dumps({"config": config, "seed": seed, "teacher": teacher, **versions}, sort_keys=True)


def digest(*tensors: Tensor) -> str:
    """Short digest of the content of tensors."""
    content = hashlib.sha256()
    for x in tensors:
        content.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def _read_if_same(path: Path, identity: str) -> dict[str, Any] | None:
    """Content of a file that belongs to the run of that identity."""
    if not path.is_file():
        return None
    again = "measures" if path.name == RESULT else "trains"
    content = read_file(path, f"delete it, and the same command {again} this network again")
    return content if content.get(_SIGNATURE, {}).get("identity") == identity else None


def read_file(path: Path, cure: str) -> dict[str, Any]:
    """Content of a checkpoint or result of a run; a damaged file is a ``ValueError`` with the cure."""
    try:
        check_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(f"{str(path)!r} is damaged: {cure}") from error


class _Signature(pl.Callback):
    """Writes the identity of a run and its training time into its checkpoints."""

    def __init__(self, identity: str, before: float) -> None:
        self.identity, self.before, self.start = identity, before, 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        seconds = self.before + time.perf_counter() - self.start
        checkpoint[_SIGNATURE] = {"identity": self.identity, "seconds": seconds}


@torch.no_grad()
def embed(network: nn.Module, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D), labels (N,) and indices (N,) of all samples of an indexed loader."""
    network.eval()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader:
        assert isinstance(batch, IndexedBatch)
        x, y = batch.batch
        parts.append((network(x.to(device)).float().cpu(), y, batch.indices))
    embeddings, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    return embeddings, labels, indices


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes, which would repeat for every run."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
