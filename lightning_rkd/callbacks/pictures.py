"""Pictures of what the student has learned so far, in validation, into the run's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_rkd import plots
from lightning_rkd.callbacks.figures import log_figure
from lightning_rkd.data.indices import loaders_in, opened


class Pictures(pl.Callback):
    """Draws how the student and its teacher see validation samples, and logs the figures with every logger.

    ``pictures/distances`` and ``pictures/angles`` need embeddings and labels only; where inputs are images, there are
    ``pictures/neighbours`` and ``pictures/map`` as well. They are drawn after validation, by the first rank from its
    own samples; the networks see these once more, in evaluation mode. What is logged where: see
    :func:`~lightning_rkd.callbacks.figures.log_figure`.

    It works with :class:`~lightning_rkd.DistillationModule`, and with any module that a
    :class:`~lightning_rkd.RelationalDistillation` is attached to and that is called with a batch's inputs.

    Args:
        samples: How many are looked at, the first of the (first) validation loader; those of the same class must be
            among them for there to be neighbours to find.
        every_n_epochs: Only after every n-th epoch.
        dark: Whether figures are for dark paper.

    Raises:
        ValueError: Fewer than 3 samples, no logger to draw for, or no module and callback that it can ask.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Pictures(every_n_epochs=5)], accelerator="cpu")
    """

    def __init__(self, samples: int = 512, every_n_epochs: int = 1, dark: bool = False) -> None:
        super().__init__()
        if samples < 3 or every_n_epochs < 1:
            raise ValueError(f"samples must be at least 3 and every_n_epochs 1, got {samples} and {every_n_epochs}")
        self.samples, self.every_n_epochs, self.dark = samples, every_n_epochs, dark

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log, on the first rank."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if not trainer.loggers:
            raise ValueError("Pictures has nothing to draw for: the Trainer has no logger, logger=CSVLogger(...)")
        if not trainer.is_global_zero:
            return
        inputs, labels, embeddings = self.look(trainer, pl_module)
        for name, figure in self.draw(inputs, labels, embeddings, trainer.current_epoch).items():
            for logger in trainer.loggers:
                log_figure(logger, f"pictures/{name}", figure, trainer.global_step)

    def draw(self, inputs: Tensor, labels: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> dict[str, Figure]:
        """The figures by name; override it for others.

        Args:
            inputs: (N, ...), of the batches.
            labels: (N,).
            embeddings: (N, D) by network, the teacher first.
            epoch: That has just ended.
        """
        title, dark = f"Validation samples, epoch {epoch}", self.dark
        found = {
            "distances": plots.relations(embeddings, labels, title=title, dark=dark),
            "angles": plots.angles(embeddings, title=title, dark=dark),
        }
        if inputs.ndim == 4 and inputs.shape[1] in (1, 3):
            images = _displayable(inputs)
            found["map"] = plots.embedding_map(images, labels, embeddings, title=title, dark=dark)
            if int(torch.bincount(labels).max()) > 1:
                found["neighbours"] = plots.neighbours(images, labels, embeddings, title=title, dark=dark)
        return found

    @torch.no_grad()
    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Inputs, labels and what each network makes of them, of the first validation samples."""
        face = _face(trainer, module)
        parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for batch in loaders_in(trainer.val_dataloaders)[0]:
            given = opened(trainer.strategy.batch_to_device(batch), face.unpack)
            if not isinstance(given.inputs, Tensor) or not isinstance(given.labels, Tensor):
                raise ValueError("Pictures needs batches of one tensor of inputs and one of labels")
            face.distiller.begin()
            try:
                with trainer.precision_plugin.forward_context():
                    module(given.inputs)
                    shown = face.distiller.shown(given, teach=not face.distiller.teacher_needs_indices)
            except BaseException:
                face.distiller.cancel()
                raise
            taught = shown.teacher_embedding
            seen = {} if taught is None else {"teacher": taught.embedding}
            seen["student"] = shown.embedding.embedding
            parts.append((given.inputs, given.labels, {name: x.float().cpu() for name, x in seen.items()}))
            if sum(len(part[1]) for part in parts) >= self.samples:
                break
        inputs = torch.cat([part[0] for part in parts])[: self.samples].float().cpu()
        labels = torch.cat([part[1] for part in parts])[: self.samples].cpu()
        names = list(parts[0][2])
        return inputs, labels, {name: torch.cat([part[2][name] for part in parts])[: self.samples] for name in names}


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
