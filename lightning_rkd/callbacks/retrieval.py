"""Evaluates the embedding of any LightningModule with retrieval metrics, without a change to its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torchmetrics import Metric

from lightning_rkd.callbacks.method_patch import unwrap_batches
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.distillation.evaluation import Evaluation
from lightning_rkd.distillation.features import FeatureReader, Layer
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.types import Batch, Key, unpack


class RetrievalEvaluation(pl.Callback):
    """Evaluates the embedding of a layer in validation and test, and logs ``val/<metric>`` and ``test/<metric>``.

    Over several ranks the rows that a distributed sampler repeats to pad its last batch are counted once: the sample
    indices come from :func:`~lightning_rkd.data.indexing.with_indices`, from the batch (``indices=``), or else from the
    loader's sampler where its order is known.

    Args:
        layer: Where to read the module, any form of ``Layer`` that gives one embedding.
        metric: A metric, or metrics by name; ``None`` is ``EmbeddingRetrieval()``.
        inputs: Key of the inputs in the batch; only needed where the batch is a mapping.
        labels: Key of the labels; default the second entry of a sequence.
        indices: Key of the sample indices.

    Raises:
        ValueError: A layer that does not exist; or several ranks and no way to know the indices.
        CaptureError: The layer was not called in a validation or test step.

    Example:
        >>> callback = RetrievalEvaluation("backbone", EmbeddingRetrieval(k=(1, 5)))
        >>> sorted(callback.metrics)
        ['metric']
    """

    def __init__(
        self,
        layer: Layer,
        metric: Metric | dict[str, Metric] | None = None,
        *,
        inputs: Key | list[str] | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
    ) -> None:
        super().__init__()
        metric = EmbeddingRetrieval() if metric is None else metric
        self.metrics = metric if isinstance(metric, dict) else {"metric": metric}
        self._keys: dict[str, Any] = {"inputs": inputs, "labels": labels, "indices": indices}
        self._reader = FeatureReader(layer, "student")
        self._undo: list[Callable[[], None]] = []
        self._evaluation: Evaluation | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State of copies and pickles, which are attached to nothing."""
        return self.__dict__ | {"_undo": [], "_evaluation": None}

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the layer, and unwrap indexed batches before the module's steps see them."""
        self._detach()
        if stage == "predict":
            return
        self._reader.attach(pl_module)
        self._undo = unwrap_batches(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module; Lightning calls no ``teardown`` here."""
        self._detach()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Empty the metrics."""
        self._begin(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Empty the metrics."""
        self._begin(trainer, pl_module, trainer.test_dataloaders)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record from now on."""
        self._reader.start()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record from now on."""
        self._reader.start()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics with the layer's embedding."""
        self._update(batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics with the layer's embedding."""
        self._update(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``val/<metric>``."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``test/<metric>``."""
        self._end(trainer, pl_module, "test")

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._evaluation = [], None
        self._reader.detach()

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: Any) -> None:
        self._evaluation = Evaluation(self.metrics, loaders, trainer.world_size, module.device)

    def _update(self, batch: Any, loader: int) -> None:
        assert self._evaluation is not None
        taps, _ = self._reader.collect()
        self._evaluation.update(loader, next(iter(taps.values())), to_batch(batch, self.unpack))

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        assert self._evaluation is not None
        if not trainer.sanity_checking:  # a few batches may be too few for a value
            for values in self._evaluation.values(stage):
                module.log_dict(values, sync_dist=True, add_dataloader_idx=False)
        self._evaluation.reset()
