"""Runs that are trained, measured, kept, and gone on with: what ``demo`` and ``compare`` stand on.

A run is a configuration as ``lightning-rkd fit`` takes it, and leaves it resolved beside its checkpoint. What
:func:`run` has finished is not done again, and what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.cli.experiments.settings import Config, with_settings
from lightning_rkd.cli.trainer import TrainingCLI
from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.indexing import IndexedBatch
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.files import check_file, write_whole


@dataclass
class Run:
    """One network that was trained and tested.

    Attributes:
        network: Name of the way it was trained; runs that differ by the seed only share it.
        seed: Its seed.
        parameters: Their number.
        seconds: How long training took.
        scores: Value by name, on the test set.
        embeddings: (N, D), of the test set, where they were kept.
        weights: Short name for the trained weights; runs with another one had another teacher.
        about: When and on what it was trained.
    """

    network: str
    seed: int
    parameters: int
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    weights: str = ""
    about: dict[str, str] = field(default_factory=dict)


class Trained(NamedTuple):
    """What training leaves to measure."""

    module: DistillationModule
    data: ImageDataModule
    seconds: float


class Loaded:
    """Keeps the images that were loaded last, for the next run that reads the same.

    Example:
        >>> loaded, images = Loaded(), LabelledImages(torch.zeros(1, 1, 2, 2), torch.zeros(1), ["a"])
        >>> data = {"class_path": "Letters", "init_args": {"seed": 0}}
        >>> loaded.keeping(data, lambda: images)() is images
        True
        >>> loaded.keeping({"class_path": "Letters", "init_args": {"seed": 1}}, lambda: 1 / 0)() is images
        True
    """

    _ORDER = ("seed", "classes_per_batch", "samples_per_class", "batches_per_epoch", "eval_batch_size", "num_workers")

    def __init__(self) -> None:
        self._key = ""
        self._images: LabelledImages | None = None

    def keeping(self, data: Config, load: Callable[[], LabelledImages]) -> Callable[[], LabelledImages]:
        """``load``, unless the last data were of the same settings; what orders batches does not count."""
        arguments = {k: v for k, v in data.get("init_args", {}).items() if k not in self._ORDER}
        key = json.dumps({**data, "init_args": arguments}, sort_keys=True, default=str)

        def kept() -> LabelledImages:
            if self._images is None or key != self._key:
                self._images = None  # both at once may not fit into memory
                self._key, self._images = key, load()
            return self._images

        return kept


Images = LabelledImages | Loaded
"""Images that were loaded, or a place that keeps them from run to run."""


def prepare(
    config: Config,
    folder: Path,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    images: Images | None = None,
) -> TrainingCLI:
    """Build what a configuration describes: ``.model``, ``.datamodule`` and ``.trainer``.

    Args:
        config: The configuration. Its seeds and its output folder are replaced; it runs without validation or logger.
        folder: Where to write.
        seed: Of initial weights, order and augmentation.
        callbacks: Callbacks that the saved configuration does not mention.
        images: What the configured data would load, where it has been loaded already, or where to keep it.
    """
    settings = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "trainer.default_root_dir": str(folder),
    }
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
    if isinstance(images, LabelledImages):
        cli.datamodule.load = lambda: images
    elif images is not None and isinstance(cli.datamodule, ImageDataModule):
        cli.datamodule.load = images.keeping(config["data"], cli.datamodule.load)  # type: ignore[method-assign]
    return cli


def train(
    config: Config,
    folder: Path,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    images: Images | None = None,
    resume: Path | None = None,
) -> Trained:
    """Train what a configuration describes, and leave ``config.yaml`` and ``last.ckpt`` in the folder.

    Arguments are those of :func:`prepare`; ``resume`` is a checkpoint to go on from.

    Returns:
        The trained module, its data, and the seconds that training took.
    """
    cli = prepare(config, folder, seed, callbacks, images)
    with _quiet():
        start = time.perf_counter()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    return Trained(cli.model, cli.datamodule, time.perf_counter() - start)


Measure = Callable[[Trained, Run | None], tuple[dict[str, float], Tensor]]
"""From what was trained and the teacher's run (``None`` for a teacher) to scores and, if they matter, embeddings."""

RESULT = "result.pt"
"""What a finished run leaves beside its checkpoint."""


def run(
    network: str,
    config: Config,
    folder: Path,
    seed: int,
    teacher: Run | None,
    callbacks: Sequence[pl.Callback] = (),
    images: Images | None = None,
    *,
    measure: Measure | None = None,
    paths: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> Run:
    """Train and measure, or go on where an earlier call with the same arguments was interrupted.

    A finished run lies in ``result.pt`` and is read from there. Result and checkpoint carry the configuration, the seed
    and the versions that they belong to: those of other settings in the same folder are not used, but replaced.

    Args:
        network: Name of the way it is trained.
        config: See :func:`prepare`.
        folder: Where to write, and where the earlier call has written.
        seed: Of initial weights, order and augmentation.
        teacher: The teacher's run; ``None`` for the teacher itself.
        callbacks: Callbacks that the saved configuration does not mention.
        images: What the configured data would load, where it has been loaded already, or where to keep it.
        measure: How the trained network is measured; ``None`` is :func:`retrieval_and_agreement`.
        paths: Further settings, which say where files lie and not what is in them: a run goes on though they change.
        about: Kept with the result.

    Raises:
        ValueError: What the earlier call has left is damaged; the message names the file.
    """
    identity = identify(config, seed, teacher, images)
    if (found := finished(network, folder, seed, identity)) is not None:
        return found
    checkpoint, signed = folder / "last.ckpt", _Signed(identity)
    if (begun := _kept(checkpoint, identity)) is not None:
        signed.before = begun[_Signed.KEY]["seconds"]
    resume = None if begun is None else checkpoint
    trained = train(with_settings(config, paths or {}), folder, seed, [*callbacks, signed], images, resume)
    with _quiet():
        scores, embeddings = (measure or retrieval_and_agreement)(trained, teacher)
    module, seconds = trained.module, signed.before + trained.seconds
    found = Run(network, seed, count_parameters(module.student), seconds, scores, embeddings)
    found.weights, found.about = digest(*module.student.state_dict().values()), dict(about or {})
    content = io.BytesIO()
    torch.save({_Signed.KEY: {"identity": identity}, **{name: getattr(found, name) for name in _KEPT}}, content)
    write_whole(folder / RESULT, content.getbuffer())
    return found


_KEPT = ("parameters", "seconds", "scores", "embeddings", "weights", "about")


def finished(network: str, folder: Path, seed: int, identity: str) -> Run | None:
    """The run of that identity, if it was finished in that folder.

    Raises:
        ValueError: Its file is damaged.
    """
    kept = _kept(folder / RESULT, identity)
    return None if kept is None else Run(network, seed, **{name: kept[name] for name in _KEPT})


class _Signed(pl.Callback):
    """Writes into a run's checkpoints what they belong to, and how long the run had taken by then."""

    KEY = "study"

    def __init__(self, identity: str) -> None:
        self.identity, self.before, self.start = identity, 0.0, 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sign."""
        seconds = self.before + time.perf_counter() - self.start
        checkpoint[self.KEY] = {"identity": self.identity, "seconds": seconds}


def identify(config: Config, seed: int, teacher: Run | None, images: Images | None = None) -> str:
    """All that a run's digits depend on, as text."""
    from lightning_rkd import __version__

    parts = {
        "config": config,
        "seed": seed,
        "teacher": None if teacher is None else teacher.weights,
        "images": digest(images.images[torch.arange(len(images.images))])
        if isinstance(images, LabelledImages)
        else None,
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
    }
    return json.dumps(parts, sort_keys=True)


def digest(*tensors: Tensor) -> str:
    """Short name for the content of tensors.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.ones(2))
        (True, False)
    """
    content = hashlib.sha256()
    for x in tensors:
        content.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def _kept(path: Path, identity: str) -> dict[str, Any] | None:
    """What a file holds, if there is one of the same identity."""
    if not path.is_file():
        return None
    check_file(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content if content.get(_Signed.KEY, {}).get("identity") == identity else None


def retrieval_and_agreement(trained: Trained, teacher: Run | None) -> tuple[dict[str, float], Tensor]:
    """Embed the test set once, and measure retrieval and the agreement with the teacher (``None`` for the teacher)."""
    embeddings, labels, indices = embed(trained.module.student, trained.data.test_dataloader())
    retrieval = EmbeddingRetrieval()
    retrieval.update(embeddings, labels, indices)
    agreement = RelationalAgreement(k=min(10, len(labels) - 1))
    agreement.update(embeddings, embeddings if teacher is None else teacher.embeddings)
    scores = {name: float(value) for m in (retrieval, agreement) for name, value in m.compute().items()}
    return scores, embeddings


def on_test_data(trained: Trained, teacher: Run | None = None) -> tuple[dict[str, float], Tensor]:
    """What the module's own metrics say of the test data."""
    found = trained.module.trainer.test(trained.module, datamodule=trained.data, verbose=False)
    return _named(found, "test"), torch.empty(0)


def on_validation_data(trained: Trained, teacher: Run | None = None) -> tuple[dict[str, float], Tensor]:
    """What the module's own metrics say of the validation data; the test data are not touched."""
    trained.module.trainer.limit_val_batches = 1.0  # none were wanted while it trained
    found = trained.module.trainer.validate(trained.module, datamodule=trained.data, verbose=False)
    return _named(found, "val"), torch.empty(0)


def _named(found: Sequence[Mapping[str, float]], stage: str) -> dict[str, float]:
    return {name.removeprefix(f"{stage}/"): float(value) for part in found for name, value in part.items()}


@torch.no_grad()
def embed(network: nn.Module, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D), labels (N,) and indices (N,) of all samples of an indexed loader.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_rkd.data import with_indices
        >>> data = TensorDataset(torch.eye(3), torch.arange(3))
        >>> embed(nn.Identity(), with_indices(DataLoader(data, batch_size=2)))[1]
        tensor([0, 1, 2])
    """
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
    """Lightning's notes and advice belong to runs that people start one by one."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
