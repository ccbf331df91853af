"""Figures of the embeddings of student and teacher during validation, logged with any logger."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lightning_rkd import plots
from lightning_rkd.callbacks.base import Callback
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.plots.style import to_png
from lightning_rkd.utils.files import write_whole
from lightning_rkd.utils.types import call_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Pictures(Callback):
    """Logs figures of the embeddings that student and teacher give to validation samples.

    After a validation epoch of a fit, the first rank draws its first samples and logs

    - ``pictures/distances`` and ``pictures/angles``: the relations of the student against those of the teacher,
    - ``pictures/map`` and ``pictures/neighbours``, if the inputs are images: the embedding in two dimensions, and
      nearest neighbours,

    with every logger, see :func:`log_figure`. The samples run through both networks once more, in evaluation mode.
    Nothing is drawn in a sanity check or under ``fast_dev_run``. The callback works with
    :class:`~lightning_rkd.DistillationModule`, and next to :class:`~lightning_rkd.RelationalDistillation` in any module
    whose ``forward`` takes the inputs of a batch.

    Args:
        samples: Number of samples that are drawn, the first ones of the first validation loader. Neighbours need
            several samples of a class among them.
        every_n_epochs: Number of epochs from one drawing to the next.
        dark: Whether figures have a dark background.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Pictures(every_n_epochs=5)], accelerator="cpu")
    """

    def __init__(self, samples: int = 512, every_n_epochs: int = 1, dark: bool = False) -> None:
        super().__init__()
        if samples < 3 or every_n_epochs < 1:
            raise ValueError(f"samples must be at least 3 and every_n_epochs 1, got {samples} and {every_n_epochs}")
        self.samples, self.every_n_epochs, self.dark = samples, every_n_epochs, dark
        self._batches: list[Any] = []
        self._rows = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is something to draw, and a logger."""
        if stage != "fit":
            return
        _find_distillation(trainer, pl_module)
        if not trainer.loggers:
            raise ValueError("Pictures has nothing to draw for: the Trainer has no logger, logger=CSVLogger(...)")
        if not trainer.enable_validation:
            raise ValueError(
                "Pictures draws validation samples, and this fit validates nothing: give it a validation loader, "
                "fit(module, train_loader, val_loader), and the module a validation_step"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard the samples of the last epoch."""
        self._batches, self._rows = [], 0

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store the first batches on the CPU."""
        draws = self._draws(trainer)
        if not (draws or trainer.sanity_checking) or dataloader_idx > 0 or self._rows >= self.samples:
            return
        labels = to_batch(batch, _find_distillation(trainer, pl_module).unpack).labels
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"Pictures needs one class number a sample, labels of shape (N,) and integer, got {got}")
        if draws:
            self._batches.append(move_data_to_device(batch, torch.device("cpu")))
            self._rows += len(labels)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log figures on the first rank."""
        if not self._draws(trainer):
            return
        # on all ranks, since each may hold a part of a sharded network
        inputs, labels, embeddings = self.compute_embeddings(trainer, pl_module)
        self._batches = []
        if not trainer.is_global_zero:
            return
        for name, figure in self.draw(inputs, labels, embeddings, trainer.current_epoch).items():
            for logger in trainer.loggers:
                log_figure(logger, f"pictures/{name}", figure, trainer.global_step)

    def draw(
        self, inputs: Tensor | None, labels: Tensor, embeddings: Mapping[str, Tensor], epoch: int
    ) -> dict[str, Figure]:
        """Draw the figures and return them by name; override it to draw others.

        Inputs (N, ...) are ``None`` if they are not a tensor; embeddings (N, D) come by network, the teacher first.
        """
        title, dark = f"Validation samples, epoch {epoch}", self.dark
        figures = {
            "distances": plots.relations(embeddings, labels, title=title, dark=dark),
            "angles": plots.angles(embeddings, title=title, dark=dark),
        }
        if inputs is not None and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
            low, high = inputs.amin((0, 2, 3), keepdim=True), inputs.amax((0, 2, 3), keepdim=True)
            images = (inputs - low) / (high - low).clamp_min(1e-12)  # normalised images, channel by channel
            figures["map"] = plots.embedding_map(images, labels, embeddings, title=title, dark=dark)
            if len(set(labels.tolist())) < len(labels):  # otherwise no sample has a neighbour of its class
                figures["neighbours"] = plots.neighbours(images, labels, embeddings, title=title, dark=dark)
        return figures

    @torch.no_grad()
    def compute_embeddings(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Inputs, labels and the embeddings by network of the first validation samples."""
        distillation = _find_distillation(trainer, module)
        parts: list[tuple[Any, Tensor, dict[str, Tensor]]] = []
        for batch in self._batches:
            given = to_batch(move_data_to_device(batch, module.device), distillation.unpack)
            distillation.distiller.start()
            try:
                # networks that are random in evaluation too would shift what training draws
                on = [module.device] if module.device.type == "cuda" else []
                with torch.random.fork_rng(on), trainer.precision_plugin.forward_context():
                    call_network(module, given.inputs)
                    features = distillation.distiller.collect(
                        given, teach=not distillation.distiller.teacher_needs_indices
                    )
            except BaseException:
                distillation.distiller.discard()
                raise
            teacher = features.teacher_embedding
            outputs = {} if teacher is None else {"teacher": teacher.embedding}
            outputs["student"] = features.embedding.embedding
            assert given.labels is not None
            parts.append((given.inputs, given.labels, {name: x.float().cpu() for name, x in outputs.items()}))
        if (count := sum(len(labels) for _, labels, _ in parts)) < 3:
            raise ValueError(f"Pictures needs at least 3 validation samples, and this rank has {count}")

        def first(rows: list[Tensor]) -> Tensor:
            return torch.cat(rows)[: self.samples].cpu()

        images = [one.float() for one, _, _ in parts if isinstance(one, Tensor)]
        embeddings = {name: first([part[2][name] for part in parts]) for name in parts[0][2]}
        return first(images) if images else None, first([labels for _, labels, _ in parts]), embeddings

    def _draws(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        logging = not trainer.fast_dev_run  # type: ignore[attr-defined] # set by a connector
        return fitting and logging and (trainer.current_epoch + 1) % self.every_n_epochs == 0


def _find_distillation(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """The module or callback with the distiller of the run."""
    for one in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        if hasattr(one, "distiller"):
            return one
    raise ValueError(
        f"Pictures finds neither student nor teacher in {type(module).__name__}: use it with DistillationModule, or "
        "beside the callback RelationalDistillation"
    )


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Log a figure with any Lightning logger, under a name whose slashes form groups or folders.

    TensorBoard, Weights & Biases and MLflow get an image; other loggers get a PNG file in their folder.
    """
    kinds = {kind.__name__ for kind in type(logger).__mro__}  # of lightning or of pytorch_lightning
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_figure(name, figure, step)
    elif "WandbLogger" in kinds:
        from PIL import Image

        logger.log_image(name, [Image.open(io.BytesIO(to_png(figure)))], step=step)
    elif "MLFlowLogger" in kinds:
        logger.experiment.log_figure(logger.run_id, figure, f"{name}-{step}.png")
    elif "DummyLogger" in kinds:  # of fast_dev_run
        return
    elif logger.log_dir or logger.save_dir:
        name = re.sub(r"[^\w.+/-]", "_", f"{name}-{step}.png")
        path = Path(str(logger.log_dir or logger.save_dir), *name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_png(figure))
    else:
        warnings.warn(
            f"{type(logger).__name__} has no folder and is none of TensorBoardLogger, WandbLogger and MLFlowLogger, so "
            f"the figure {name!r} is not logged; add a CSVLogger, which keeps figures as files",
            stacklevel=2,
        )
