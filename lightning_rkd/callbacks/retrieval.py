"""Evaluation of the embeddings of any LightningModule with retrieval metrics, without a change to its code."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torchmetrics import Metric

from lightning_rkd.callbacks.base import Callback
from lightning_rkd.callbacks.method_patch import unwrap_batches
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.distillation.evaluation import Evaluation
from lightning_rkd.distillation.features import FeatureReader
from lightning_rkd.distillation.layers import Layer
from lightning_rkd.distillation.lightning import log_evaluation, start_evaluation
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.types import Batch, Key, unpack


class RetrievalEvaluation(Callback):
    """Evaluates the embedding of a layer in validation and test, and logs ``val/<metric>`` and ``test/<metric>``.

    Every sample counts once, also the rows that a distributed sampler repeats to fill the last batch: samples are
    identified by their indices, which come from :func:`~lightning_rkd.data.indexing.with_indices`, from the batch
    (``indices=``), or from the sampler of the loader if its order is known.

    Args:
        layer: Layer whose output is the embedding, in any form of :data:`~lightning_rkd.distillation.layers.Layer`; a
            layer gives its output, whatever its class.
        metric: A metric, or metrics by name. Default: ``EmbeddingRetrieval()``.
        labels: Entry of a batch with the labels: a position, a key, a field of a named tuple or dataclass, or a dotted
            path. Default: the second entry of a sequence.
        indices: Entry with the sample indices, in the same forms.

    Raises:
        ValueError: A layer that does not exist, or several ranks without sample indices.
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
        labels: Key | None = None,
        indices: Key | None = None,
    ) -> None:
        super().__init__()
        metric = EmbeddingRetrieval() if metric is None else metric
        self.metrics = metric if isinstance(metric, dict) else {"metric": metric}
        # the layer is read, so no inputs are needed
        self._keys: dict[str, Any] = {"inputs": [], "labels": labels, "indices": indices}
        self._reader = FeatureReader(layer, "student")
        self._undo: list[Callable[[], None]] = []
        self._evaluation: Evaluation | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State of copies and pickles, which are not attached to a module."""
        return self.__dict__ | {"_undo": [], "_evaluation": None}

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the layer, and pass batches to the module's steps without the indices that loaders added."""
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
        self._evaluation = start_evaluation(self.metrics, trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start recording the layer's output."""
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
        assert self._evaluation is not None
        taps, _ = self._reader.collect()
        self._evaluation.update(dataloader_idx, next(iter(taps.values())), to_batch(batch, self.unpack))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics and empty them."""
        assert self._evaluation is not None
        log_evaluation(self._evaluation, trainer, pl_module)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._evaluation = [], None
        self._reader.detach()
