"""A LightningModule that trains a student: with a teacher and a relational loss, or without them for the task alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rkd.data.indexing import to_batch
from lightning_rkd.data.loaders import count_samples, load_first_samples
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.evaluation import Evaluation
from lightning_rkd.distillation.features import CaptureError, Layer
from lightning_rkd.distillation.gradient_balance import balance_weights
from lightning_rkd.distillation.lightning import (
    exclude_from_ddp_broadcast,
    number_training_batches,
    refuse_averages,
    refuse_lbfgs,
    refuse_unsynchronised,
    restore_after_exceptions,
    save_plain_hyperparameters,
)
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.distillation.teachers import BaseTeacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import LossSum, Weight, evaluate_weight
from lightning_rkd.metrics.inputs import update_parameters
from lightning_rkd.utils.distributed import data_parallel_group, gather_rows, rank_and_size, row_counts
from lightning_rkd.utils.private import load_dataloaders
from lightning_rkd.utils.types import Batch, Key, Outputs, unpack


def _do_nothing() -> None: ...


class DistillationModule(pl.LightningModule):
    r"""Trains a student by

    .. math:: L = w_{task} L_{task} + w \sum_k w_k L_k(s, t).

    Without teacher and loss it trains the task loss alone, so the same class trains teachers and baselines. Override
    :meth:`unpack` for batches of other types; everything else of a LightningModule may be overridden as usual.

    Logged: ``train/loss``, ``train/task``, ``distill/<term>`` per step, and per evaluation epoch ``val/<metric>`` and
    ``test/<metric>``.

    Args:
        student: The network to train. ``forward`` is its forward.
        teacher: A network, a :class:`~lightning_rkd.Teacher`, a
            :class:`~lightning_rkd.CachedTeacher`, or an
            :class:`~lightning_rkd.EnsembleTeacher` of several. Absent from checkpoints, optimizers and
            parameter counts; not needed to validate, test or predict.
        loss: A relational loss, a sum, or a dict of losses.
        task_loss: Any ``nn.Module`` called ``(outputs, labels)``: of ``torch.nn``, or a loss of
            pytorch-metric-learning. Its parameters are trained along.
        task_reads: What the task loss reads: ``"embedding"`` (relates samples, so it sees the batches of all ranks) or
            ``"logits"`` (a mean over samples, so it sees the rank's own).
        miner: A pytorch-metric-learning miner for the task loss.
        metrics: torchmetrics metrics by name, updated in validation and test with what the parameters of their
            ``update`` are named after: ``embeddings``, ``labels``, ``indices``, ``is_query``, ``student``,
            ``teacher``, ``preds``, ``target``.
        optimizer: From parameters to optimizer.
        lr_scheduler: From optimizer to scheduler.
        lr_interval: Whether the scheduler steps per ``"epoch"`` or per ``"step"``.
        batch_transform: From :class:`~lightning_rkd.utils.types.Batch` to ``Batch``, in training, before both networks
            (mixup, rotations).
        student_layer: Where to read the student, any form of ``Layer``; ``None`` is its output.
        teacher_layer: The same for the teacher.
        input_layer: Student layer whose inputs feed the teacher; ``None`` feeds it the batch.
        inputs: Key of the inputs in the batch; needed where the batch is a mapping.
        labels: Key of the labels.
        indices: Key of the sample indices.
        weight: Weight of all relational terms, a number or a function of the epoch.
        task_weight: Weight of the task loss, likewise.
        gather: Whether relations and an embedding task loss span the batches of all ranks.
        balance: Answers "which weight?": in every step each term is weighted so that the norm of its gradient at what
            it reads is ``balance`` times the task loss's there (times its own weight). The weights found are logged as
            ``balance/<term>``; where they settle, they can be written down as fixed ones. ``None`` takes the weights as
            they are.
        log_gradients: Whether steps that are logged also log ``gradient/<term>``: how long the weighted term's gradient
            is at what it reads, in units of the weighted task's. It costs a backward pass of each in those steps.

    Losses with tensors of their own (projectors, banks) are trained and saved with the student; what sizes they do not
    know are taken from ``example_input_array``, or else from two samples of the training loader, before optimizers
    exist.

    Raises:
        ValueError: A loss without a teacher when a fit begins, nothing to train with, or a student that is frozen.
        NonFiniteError: NaN or infinity in an output, with side, row and step; in a loss; or in the weights, when a
            checkpoint is about to be written.

    Example:
        >>> from lightning_rkd.losses.rkd import RKD
        >>> module = DistillationModule(nn.Linear(8, 2), teacher=nn.Linear(8, 4), loss=RKD())
        >>> module(torch.ones(3, 8)).shape, len(list(module.parameters()))
        (torch.Size([3, 2]), 2)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: BaseTeacher | nn.Module | None = None,
        loss: RelationalLoss | LossSum | dict[str, RelationalLoss | LossSum] | None = None,
        *,
        task_loss: nn.Module | None = None,
        task_reads: Literal["embedding", "logits"] = "embedding",
        miner: nn.Module | None = None,
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: nn.Module | Callable[[Batch], Batch] | None = None,
        student_layer: Layer | None = None,
        teacher_layer: Layer | None = None,
        input_layer: str | None = None,
        inputs: Key | list[str] | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
        weight: Weight = 1.0,
        task_weight: Weight = 1.0,
        gather: bool = True,
        balance: float | None = None,
        log_gradients: bool = False,
    ) -> None:
        super().__init__()
        if balance is not None and (balance < 0 or task_loss is None):
            raise ValueError(f"balance needs a task_loss to compare with, and must be at least 0, got {balance}")
        if log_gradients and task_loss is None:
            raise ValueError("log_gradients needs a task_loss to compare the terms with")
        save_plain_hyperparameters(self, inspect.currentframe())
        self.student, self.task_loss, self.miner = student, task_loss, miner
        self.loss = LossSum(loss) if isinstance(loss, dict) else loss
        self.metrics = nn.ModuleDict(metrics or {})
        self.task_reads, self.batch_transform, self.task_weight = task_reads, batch_transform, task_weight
        self.balance, self.log_gradients = balance, log_gradients
        self._optimizer, self._lr_scheduler, self._lr_interval = optimizer, lr_scheduler, lr_interval
        self._keys: dict[str, Any] = {"inputs": inputs, "labels": labels, "indices": indices}
        self.distiller = Distiller(
            teacher,
            self.loss,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            input_layer=input_layer,
            weight=weight,
            gather=gather,
        )
        self._evaluation: Evaluation
        self._undo_numbers: Callable[[], None] = _do_nothing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student returns."""
        return self.student(*args, **kwargs)

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and the scheduler if there is one."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self._lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def setup(self, stage: str) -> None:
        """Check that there is something to train, and hook the networks."""
        restore_after_exceptions(self.trainer)
        if stage == "fit":
            if self.loss is None and self.task_loss is None:
                raise ValueError("nothing to train with: pass task_loss=..., or teacher=... and loss=...")
            if not any(p.requires_grad for p in self.student.parameters()):
                raise ValueError("the student is frozen: none of its parameters requires a gradient")
        measured = [name for name, metric in self._metrics().items() if "teacher" in update_parameters(metric)]
        if measured and stage != "predict" and self.distiller.teacher is None:
            raise ValueError(f"the metrics {measured} compare with the teacher: pass teacher=..., or leave them out")
        teach = stage != "predict" and bool(measured or (stage == "fit" and self.loss is not None))
        self.distiller.attach(self.student, teach=teach)
        if stage == "fit":
            if self.distiller.teacher_needs_indices:
                self._refuse_changed_batches()
                if self._keys["indices"] is None:
                    self._undo_numbers = number_training_batches(self.trainer)
            self._make_losses_ready()
            exclude_from_ddp_broadcast(self)

    @property
    def needs_indices(self) -> bool:
        """Whether a loss or the teacher needs the indices of the samples; read by our data modules."""
        return self.distiller.needs_indices

    def teardown(self, stage: str) -> None:
        """Restore the teacher."""
        self.restore()

    def restore(self) -> None:
        """Remove all hooks and restore the teacher."""
        self._undo_numbers()
        self._undo_numbers = _do_nothing
        self.distiller.detach()

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device."""
        self._prepare()
        self._prepare_training_data()
        refuse_lbfgs(self.trainer.optimizers, self.distiller.stateful_losses)
        refuse_unsynchronised(self.distiller.losses, self.trainer.strategy, self.distiller.gather)

    def on_train_start(self) -> None:
        """Move the teacher, where Lightning's learning rate finder trains before ``on_fit_start``."""
        self._prepare()
        self._prepare_training_data()

    def on_train_end(self) -> None:
        """Report what the checks of the last steps have found."""
        self.distiller.finish()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The weighted sum of task loss and relational terms."""
        features, output, terms = self.forward_both(batch)
        logged = {f"distill/{name}": value for name, value in terms.items()}
        parts = []
        if self.task_loss is not None:
            task = self.task(features, output)
            logged["train/task"] = task
            parts.append(evaluate_weight(self.task_weight, self.current_epoch) * task)
        self.distiller.check_losses(logged, self.global_step)
        if terms and (self.balance is not None or self._logs_gradients_now):
            logged |= self._balance_terms(terms, parts[0], features)
        loss = torch.stack([*parts, *terms.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({name: value.detach() for name, value in logged.items()})
        return loss

    @property
    def _logs_gradients_now(self) -> bool:
        """Whether this step logs them."""
        logs = (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        return self.log_gradients and logs

    def forward_both(self, batch: Any) -> tuple[StepFeatures, Any, dict[str, Tensor]]:
        """Run both networks on a batch: their features, the output of the student, and the relational terms."""
        given = self._to_batch(batch)
        if self.batch_transform is not None:
            given = self.batch_transform(given)
        self.distiller.start()
        output = self._call(given.inputs)
        features = self.distiller.collect(given, teach=self.loss is not None)
        terms = self.distiller.compute_terms(features, epoch=self.current_epoch, step=self.global_step)
        return features, output, terms

    def _balance_terms(self, terms: dict[str, Tensor], task: Tensor, features: StepFeatures) -> dict[str, Tensor]:
        """Balance the terms where ``balance`` is set; returns the weights and gradient norms to log."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        factors = balance_weights(
            terms,
            task,
            features.student,
            self.distiller.bound,
            self.distiller.group,
            None if scaler is None else scaler.scale,
        )
        logged = {}
        for name, factor in factors.items():
            if self.balance is None:
                logged[f"gradient/{name}"] = torch.where(factor > 0, 1 / factor, 0)
                continue
            weight = self.distiller.weight_of(name, self.current_epoch)
            scale = self.balance * abs(weight) * factor
            terms[name] = scale * terms[name]
            logged[f"balance/{name}"] = scale * weight
            if self.log_gradients:
                logged[f"gradient/{name}"] = torch.where(factor > 0, self.balance * abs(weight), factor)
        return logged

    def task(self, features: StepFeatures, output: Any) -> Tensor:
        """The task loss of a step: of the rows of all ranks for an embedding, of the rank's own rows for logits."""
        assert self.task_loss is not None
        labels = features.batch.labels
        if labels is None:
            raise ValueError("the task loss needs labels, but the batch has none: say where they are, labels=...")
        read = features.embedding.embedding if self.task_reads == "embedding" else output
        if not isinstance(read, Tensor):
            raise ValueError(f"the student gives no {self.task_reads} for the task loss, but {type(read).__name__}")
        if self.task_reads == "embedding" and features.views > 1:
            labels = torch.cat([labels] * features.views)
        if (rows := features.batch.task_rows) is not None:
            read, labels = read[rows], labels[rows]
        read = read if read.dtype == torch.float64 else read.float()
        group, ranks = self.distiller.group, rank_and_size(self.distiller.group)[1]
        share = 1.0
        if self.distiller.gather and ranks > 1:
            counts = row_counts(len(read), read.device, group)
            if self.task_reads == "embedding":
                read, labels = gather_rows(read, counts, group), gather_rows(labels, counts, group)
            else:
                share = ranks * len(read) / sum(counts)
        with torch.autocast(read.device.type, enabled=False):
            mined = () if self.miner is None else (self.miner(read, labels),)
            task: Tensor = self.task_loss(read, labels, *mined)
        return task if share == 1 else share * task

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics."""
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """The embedding of the batch."""
        given = self._to_batch(batch)
        self.distiller.start()
        self._call(given.inputs)
        return self.distiller.collect(given, teach=False).embedding.embedding

    def on_validation_start(self) -> None:
        """Empty the metrics."""
        self._begin_evaluation(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Empty the metrics."""
        self._begin_evaluation(self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<metric>``."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/<metric>``."""
        self._end_evaluation("test")

    def _to_batch(self, batch: Any) -> Batch:
        return to_batch(batch, self.unpack)

    def _call(self, inputs: Any) -> Any:
        return self(**inputs) if isinstance(inputs, Mapping) else self(inputs)

    def _prepare(self) -> None:
        self.distiller.prepare(
            self.device, self.trainer.precision_plugin.convert_module, data_parallel_group(self.trainer.strategy)
        )

    def _prepare_training_data(self) -> None:
        if self.distiller.teacher_needs_indices:
            with isolate_rng(include_cuda=False):
                self.distiller.prepare_data(load_dataloaders(self.trainer), self.unpack)

    def _refuse_changed_batches(self) -> None:
        if self.batch_transform is not None:
            raise ValueError(
                f"batch_transform={type(self.batch_transform).__name__} changes the images of a batch, and a cached "
                "teacher has never seen the changed ones: leave it out, or teach with Teacher(network)"
            )

    def _make_losses_ready(self) -> None:
        """Before optimizers and DDP exist; missing widths are taken from one pass of the networks in eval mode."""
        missing = self.distiller.missing_sizes
        if not missing:
            self.distiller.materialize()
            return
        unsized = [term for term in self.distiller.losses.values() if term.loss.missing_sizes]
        with isolate_rng(include_cuda=False):
            loader = load_dataloaders(self.trainer)
            batch = self._example(loader) if missing - {"num_samples"} else None
            try:
                features = None if batch is None else self._run_once(batch)
            except CaptureError:
                raise
            except Exception as error:
                cure = ", ".join(term.loss.suggest_call({}) for term in unsized)
                raise ValueError(
                    f"the networks failed in the pass that finds their widths ({error}): set example_input_array, "
                    f"or pass {cure}"
                ) from error
        self.distiller.materialize(features, count_samples(loader))
        cure = ", ".join(term.loss.suggest_call({}) for term in unsized)
        refuse_averages(self.trainer.callbacks, f"give the losses their sizes, {cure}")  # type: ignore[attr-defined]

    def _example(self, loader: Any) -> Batch | None:
        """A batch for both networks: the example input, else the first samples of the training set."""
        example = self.example_input_array
        if isinstance(example, tuple) and len(example) == 1:
            (example,) = example
        if isinstance(example, Tensor | Mapping) and not self.distiller.teacher_needs_indices:
            return Batch(example)
        batch = load_first_samples(loader)
        if batch is None:
            return None
        transform = copy.deepcopy(self.batch_transform)  # it may count its steps
        return self._to_batch(batch) if transform is None else transform(self._to_batch(batch))

    @torch.no_grad()
    def _run_once(self, batch: Batch) -> StepFeatures:
        assert self.distiller.teacher is not None
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        try:
            self.distiller.start()
            self._call(batch.inputs)
            return self.distiller.collect(batch)
        finally:
            self.distiller.discard()
            for module, training in modes:
                module.training = training

    def _metrics(self) -> dict[str, Metric]:
        return dict(self.metrics.items())  # type: ignore[arg-type] # a ModuleDict of metrics

    def _begin_evaluation(self, loaders: Any) -> None:
        self._prepare()
        self._evaluation = Evaluation(self._metrics(), loaders, self.trainer.world_size, self.device)
        if self.distiller.teacher_needs_indices and self._evaluation.wants("teacher"):
            self.distiller.prepare_data(loaders, self.unpack, train=False)

    def _evaluate(self, batch: Any, loader: int) -> None:
        given = self._to_batch(batch)
        self.distiller.start()
        output = self._call(given.inputs)
        features = self.distiller.collect(given, teach=self._evaluation.wants("teacher", loader))
        logits = output if isinstance(output, Tensor) else None
        student = Outputs(embedding=features.embedding.embedding, logits=logits)
        self._evaluation.update(loader, student, given, features.teacher_embedding)

    def _end_evaluation(self, stage: str) -> None:
        if not self.trainer.sanity_checking:  # a few batches may be too few for a value
            for values in self._evaluation.values(stage):
                self.log_dict(values, sync_dist=True, add_dataloader_idx=False)
        self._evaluation.reset()
