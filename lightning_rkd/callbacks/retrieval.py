"""Evaluation of the embeddings of any LightningModule with retrieval metrics, without a change to its code."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torchmetrics import Metric

from lightning_rkd.callbacks.base import Callback
from lightning_rkd.callbacks.method_patch import unwrap_batches
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.evaluation import Evaluation, warn_if_not_aligned
from lightning_rkd.distillation.layers import Layer
from lightning_rkd.distillation.lightning import log_evaluation, start_evaluation
from lightning_rkd.distillation.teachers import BaseTeacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.metrics import StoredGallery
from lightning_rkd.metrics.asymmetric import AsymmetricRetrieval, Searched, choose_gallery
from lightning_rkd.metrics.inputs import uses_teacher
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.types import Batch, Key, Keys, unpack


class RetrievalEvaluation(Callback):
    """Evaluates the embedding of a layer in validation and test, and logs ``val/<metric>`` and ``test/<metric>``.

    Every sample counts once, also the rows that a distributed sampler repeats to fill the last batch: samples are
    identified by their indices, which come from :func:`~lightning_rkd.data.indexing.with_indices`, from the batch
    (``indices=``), or from the sampler of the loader if its order is known.

    In the teacher's gallery a query does not find its own sample, and values are called ``asymmetric/<value>``; see
    :class:`~lightning_rkd.metrics.AsymmetricRetrieval`. The projection of a loss that aligns the student's space with
    the teacher's maps the queries to it; a warning says if no loss of the training does.

    Args:
        layer: Layer whose output is the embedding, in any form of :data:`~lightning_rkd.distillation.layers.Layer`; a
            layer gives its output, whatever its class.
        metric: A metric, or metrics by name. Default: ``EmbeddingRetrieval()``, with ``distance="cosine"`` if the
            teacher's gallery is searched.
        gallery: Gallery in which every ``EmbeddingRetrieval`` searches: rows of the ``"student"``, of the ``"teacher"``
            for the same samples, ``"both"``, or rows that were embedded before, a
            :class:`~lightning_rkd.metrics.StoredGallery`.
        teacher: The teacher, for the teacher's gallery and for metrics that compare with it: a network, a
            :class:`~lightning_rkd.Teacher` or any other. Default: that of the ``RelationalDistillation`` among the
            callbacks, or of the ``DistillationModule``, with its layer and entries of a batch.
        teacher_layer: Layer of the teacher; ``None`` reads its output.
        inputs: Entry of a batch with the inputs of the teacher, in any form of :data:`~lightning_rkd.utils.types.Keys`.
            Default: the first entry.
        labels: Entry of a batch with the labels: a position, a key, a field of a named tuple or dataclass, or a dotted
            path. Default: the second entry of a sequence.
        indices: Entry with the sample indices, in the same forms.

    Raises:
        ValueError: A layer that does not exist, several ranks without sample indices, or no teacher for its gallery.
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
        gallery: Searched | StoredGallery = "student",
        teacher: BaseTeacher | nn.Module | None = None,
        teacher_layer: Layer | None = None,
        inputs: Keys | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
    ) -> None:
        super().__init__()
        if metric is None:
            metric = EmbeddingRetrieval(distance="euclidean" if gallery == "student" else "cosine")
        self.metrics = choose_gallery(metric if isinstance(metric, dict) else {"metric": metric}, gallery)
        self._given: dict[str, Any] = {"inputs": inputs, "labels": labels, "indices": indices}
        self._distiller = Distiller(teacher, None, student_layer=layer, teacher_layer=teacher_layer)
        self._layer, self._teacher, self._teacher_layer = layer, teacher, teacher_layer
        self._keys = self._given
        self._losses: list[RelationalLoss] = []
        self._undo: list[Callable[[], None]] = []
        self._evaluation: Evaluation | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State of copies and pickles, which are not attached to a module."""
        return self.__dict__ | {"_undo": [], "_evaluation": None, "_losses": []}

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the layers, and pass batches to the module's steps without the indices that loaders added."""
        self._detach()
        if stage == "predict":
            return
        teach = any(map(uses_teacher, self.metrics.values()))
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        parts: list[Any] = [*callbacks, pl_module]
        holders = [x for x in parts if isinstance(getattr(x, "distiller", None), Distiller)]
        self._losses = [term.loss for x in holders for term in x.distiller.losses.values()]
        # without a teacher only the layer is read, and no inputs are needed
        self._keys = self._given if teach else {**self._given, "inputs": []}
        if teach and self._teacher is None:
            self._borrow_teacher([x for x in holders if x.distiller.teacher is not None])
        warn_if_not_aligned(self.metrics, self._losses)
        self._distiller.attach(pl_module, teach=teach)
        self._undo = unwrap_batches(pl_module)

    def _borrow_teacher(self, holders: list[Any]) -> None:
        """Read the teacher of a distillation as that reads it."""
        if not holders:
            needing = {name: metric for name, metric in self.metrics.items() if uses_teacher(metric)}
            searches = all(isinstance(metric, AsymmetricRetrieval) for metric in needing.values())
            stored = ", or gallery=StoredGallery(...) with rows that were embedded before" if searches else ""
            raise ValueError(f"the metrics {list(needing)} need the teacher's rows: pass teacher=...{stored}")
        other: Distiller = holders[0].distiller
        layer = other.teacher_layer if self._teacher_layer is None else self._teacher_layer
        fed = None if other.inputs is None else other.inputs.layer
        self._distiller = Distiller(
            other.teacher, None, student_layer=self._layer, teacher_layer=layer, input_layer=fed
        )
        own = {key: value for key, value in self._given.items() if value is not None}
        if "inputs" in own:
            own["teacher_inputs"] = None
        self._keys = {**getattr(holders[0], "_keys", self._given), **own}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module; Lightning calls no ``teardown`` here."""
        self._detach()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Empty the metrics."""
        self._evaluation = start_evaluation(
            self.metrics, trainer, pl_module, self._distiller, self._losses, self.unpack
        )

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start recording the layer's output."""
        self._distiller.start()

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
        given = to_batch(batch, self.unpack)
        features = self._distiller.collect(given, teach=self._evaluation.uses_teacher(dataloader_idx))
        student = next(iter(features.student.values()))
        self._evaluation.update(dataloader_idx, student, given, features.teacher_embedding)

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
        self._distiller.detach()
