"""Pictures of what the student has learned so far, in validation, into the run's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lightning_rkd import plots
from lightning_rkd.callbacks.figure_loggers import log_figure
from lightning_rkd.data.indexing import to_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Pictures(pl.Callback):
    """Draws how the student and its teacher see validation samples, and logs the figures with every logger.

    ``pictures/distances`` and ``pictures/angles`` need embeddings and labels only; where inputs are images, there are
    ``pictures/neighbours`` and ``pictures/map`` as well. They are drawn after the validations of a fit, by the first
    rank from its own samples; the networks see these once more, in evaluation mode. What is logged where: see
    :func:`~lightning_rkd.callbacks.figure_loggers.log_figure`. ``fast_dev_run`` logs nothing, and draws nothing.

    It works with :class:`~lightning_rkd.DistillationModule`, and with any module that a
    :class:`~lightning_rkd.RelationalDistillation` is attached to and that is called with a batch's inputs.

    Args:
        samples: How many are looked at, the first of the (first) validation loader; those of the same class must be
            among them for there to be neighbours to find.
        every_n_epochs: Only after every n-th epoch.
        dark: Whether figures are for dark paper.

    Raises:
        ValueError: Fewer than 3 samples. When a fit begins: no logger to draw for, no validation, no module and
            callback that it can ask, or labels that are not one class number a sample.

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
        """Refuse, before anything is trained, what cannot be drawn."""
        if stage != "fit":
            return
        _face(trainer, pl_module)
        if not trainer.loggers:
            raise ValueError("Pictures has nothing to draw for: the Trainer has no logger, logger=CSVLogger(...)")
        if not trainer.enable_validation:
            raise ValueError(
                "Pictures draws validation samples, and this fit validates nothing: give it a validation loader, "
                "fit(module, train_loader, val_loader), and the module a validation_step"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._batches, self._rows = [], 0

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batches, on the CPU."""
        draws = self._draws(trainer)
        if not (draws or trainer.sanity_checking) or dataloader_idx > 0 or self._rows >= self.samples:
            return
        labels = to_batch(batch, _face(trainer, pl_module).unpack).labels
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"Pictures needs one class number a sample, labels of shape (N,) and integer, got {got}")
        if draws:
            self._batches.append(move_data_to_device(batch, torch.device("cpu")))
            self._rows += len(labels)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log, on the first rank."""
        if not self._draws(trainer):
            return
        inputs, labels, embeddings = self.look(trainer, pl_module)  # all ranks: they may hold a part of a network each
        self._batches = []
        if not trainer.is_global_zero:
            return
        for name, figure in self.draw(inputs, labels, embeddings, trainer.current_epoch).items():
            for logger in trainer.loggers:
                log_figure(logger, f"pictures/{name}", figure, trainer.global_step)

    def draw(
        self, inputs: Tensor | None, labels: Tensor, embeddings: Mapping[str, Tensor], epoch: int
    ) -> dict[str, Figure]:
        """The figures by name; override it for others.

        Args:
            inputs: (N, ...), of the batches; ``None`` where they are not one tensor.
            labels: (N,).
            embeddings: (N, D) by network, the teacher first.
            epoch: That has just ended.
        """
        title, dark = f"Validation samples, epoch {epoch}", self.dark
        found = {
            "distances": plots.relations(embeddings, labels, title=title, dark=dark),
            "angles": plots.angles(embeddings, title=title, dark=dark),
        }
        if inputs is not None and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
            images = _displayable(inputs)
            found["map"] = plots.embedding_map(images, labels, embeddings, title=title, dark=dark)
            if len(set(labels.tolist())) < len(labels):  # else there are no neighbours to find
                found["neighbours"] = plots.neighbours(images, labels, embeddings, title=title, dark=dark)
        return found

    @torch.no_grad()
    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Inputs, labels and what each network makes of them, of the first validation samples."""
        face = _face(trainer, module)
        parts: list[tuple[Any, Tensor, dict[str, Tensor]]] = []
        for batch in self._batches:
            given = to_batch(move_data_to_device(batch, module.device), face.unpack)
            face.distiller.start()
            try:
                # networks that are random in evaluation too would shift what training draws
                on = [module.device] if module.device.type == "cuda" else []
                with torch.random.fork_rng(on), trainer.precision_plugin.forward_context():
                    _ = module(**given.inputs) if isinstance(given.inputs, Mapping) else module(given.inputs)
                    features = face.distiller.collect(given, teach=not face.distiller.teacher_needs_indices)
            except BaseException:
                face.distiller.discard()
                raise
            taught = features.teacher_embedding
            seen = {} if taught is None else {"teacher": taught.embedding}
            seen["student"] = features.embedding.embedding
            assert given.labels is not None
            parts.append((given.inputs, given.labels, {name: x.float().cpu() for name, x in seen.items()}))
        if (count := sum(len(labels) for _, labels, _ in parts)) < 3:
            raise ValueError(f"Pictures needs at least 3 validation samples, and this rank has {count}")

        def first(rows: list[Tensor]) -> Tensor:
            return torch.cat(rows)[: self.samples].cpu()

        images = [one.float() for one, _, _ in parts if isinstance(one, Tensor)]
        embeddings = {name: first([part[2][name] for part in parts]) for name in parts[0][2]}
        return first(images) if images else None, first([labels for _, labels, _ in parts]), embeddings

    def _draws(self, trainer: pl.Trainer) -> bool:
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        logs = not trainer.fast_dev_run  # type: ignore[attr-defined] # set by a connector
        return fits and logs and (trainer.current_epoch + 1) % self.every_n_epochs == 0


def _face(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """Whatever holds student and teacher of the run."""
    for one in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        if hasattr(one, "distiller"):
            return one
    raise ValueError(
        f"Pictures finds neither student nor teacher in {type(module).__name__}: use it with DistillationModule, or "
        "beside the callback RelationalDistillation"
    )


def _displayable(inputs: Tensor) -> Tensor:
    """Normalised images stretched back to 0 to 1, each channel over all of them."""
    low, high = (inputs.amin((0, 2, 3), keepdim=True), inputs.amax((0, 2, 3), keepdim=True))
    return (inputs - low) / (high - low).clamp_min(1e-12)
