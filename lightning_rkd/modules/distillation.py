"""LightningModule that trains a student with a task loss, relational losses against a teacher, or both."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rkd.data.indexing import to_batch
from lightning_rkd.data.loaders import number_batches
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.evaluation import Evaluation, warn_if_not_aligned
from lightning_rkd.distillation.gradient_balance import Compare, GradientBalance
from lightning_rkd.distillation.layers import Layer
from lightning_rkd.distillation.lightning import (
    apply_balance,
    exclude_from_ddp_broadcast,
    log_evaluation,
    prepare_fit,
    refuse_balance,
    refuse_lbfgs,
    refuse_unsynchronised,
    restore_after_exceptions,
    save_plain_hyperparameters,
    start_evaluation,
)
from lightning_rkd.distillation.micro_batches import check_size, count_parts, count_rows, run_parts, split_rows
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.distillation.teachers import BaseTeacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import LossSum, Weight, evaluate_weight
from lightning_rkd.metrics import StoredGallery
from lightning_rkd.metrics.asymmetric import Searched, choose_gallery
from lightning_rkd.metrics.inputs import uses_teacher
from lightning_rkd.modules.sizes import materialize_losses
from lightning_rkd.utils.distributed import gather_row_counts, gather_rows, rank_and_size
from lightning_rkd.utils.private import wrap_train_dataloader, writes_logs
from lightning_rkd.utils.types import Batch, Key, Keys, Outputs, call_network, unpack


def _do_nothing() -> None: ...


class DistillationModule(pl.LightningModule):
    r"""Trains a student with a task loss, with relational losses against a teacher, or with both.

    .. math:: L = w_{task} L_{task} + w \sum_k w_k L_k(s, t)

    where s and t are the features of student and teacher for the same inputs. Without teacher and loss it trains the
    task loss alone, so that the same class trains teachers and baselines. Override :meth:`unpack` for batches of other
    types, and any other hook of a LightningModule as usual.

    It logs ``train/loss``, ``train/task`` and ``distill/<term>`` in training, and ``val/<metric>`` and
    ``test/<metric>`` at the end of an evaluation.

    The tensors of losses (projectors, memory banks) are trained and saved with the student. Missing sizes of losses are
    inferred before optimizers are created, in one pass over ``example_input_array`` or the first two training samples.

    Args:
        student: The network to train. ``forward`` calls it.
        teacher: A network, a :class:`~lightning_rkd.Teacher`, a :class:`~lightning_rkd.CachedTeacher`, or an
            :class:`~lightning_rkd.EnsembleTeacher` of several. It is not a submodule, so it is absent from checkpoints,
            optimizers and parameter counts, and it is not needed to validate, test or predict.
        loss: A relational loss, a sum such as ``25 * RKDDistance() + 50 * RKDAngle()``, or a dict of losses.
        task_loss: A module called as ``task_loss(outputs, labels)``, from ``torch.nn`` or pytorch-metric-learning. Its
            parameters are trained too.
        task_reads: Input of the task loss: ``"embedding"`` (a loss that relates samples; it receives the rows of all
            ranks) or ``"logits"`` (a mean over samples; it receives the rank's own rows).
        miner: A pytorch-metric-learning miner for the task loss.
        metrics: torchmetrics metrics by name, updated in validation and test. The parameters of a metric's ``update``
            select its inputs by their names: ``embeddings``, ``labels``, ``indices``, ``is_query``, ``student``,
            ``teacher``, ``queries``, ``gallery``, ``preds``, ``target``.
        gallery: Gallery in which every :class:`~lightning_rkd.metrics.EmbeddingRetrieval` among the metrics searches:
            rows of the ``"student"``, of the ``"teacher"`` for the same samples, ``"both"``, or rows that were embedded
            before, a :class:`~lightning_rkd.metrics.StoredGallery`. In the teacher's gallery a query does not find its
            own sample, the projection of a loss maps the queries to the teacher's space, and values are called
            ``asymmetric/<value>``; see :class:`~lightning_rkd.metrics.AsymmetricRetrieval`.
        optimizer: A function from parameters to an optimizer.
        lr_scheduler: A function from an optimizer to a learning rate scheduler.
        lr_interval: Whether the scheduler steps once per ``"epoch"`` or per ``"step"``.
        batch_transform: A function from :class:`~lightning_rkd.utils.types.Batch` to ``Batch`` (mixup, rotations),
            applied in training before both networks.
        student_layer: Layer of the student whose features losses and metrics receive, in any form of
            :data:`~lightning_rkd.distillation.layers.Layer`; ``None`` reads its output. A layer gives its output,
            whatever its class; ``Tap(layer, at="classifier")`` reads a head.
        teacher_layer: The same for the teacher.
        input_layer: Layer of the student whose inputs the teacher receives; ``None`` passes the inputs of the batch.
        inputs: Entry of a batch with the inputs: a position, a key, a field of a named tuple or dataclass, or a dotted
            path such as ``"views.global"``; or several, in any form of :data:`~lightning_rkd.utils.types.Keys`.
            Required if batches are mappings or dataclasses; default: the first entry.
        teacher_inputs: Entries with the inputs of the teacher, in the same forms; ``None`` passes it ``inputs``.
        labels: Entry with the labels. Default: the second entry of a sequence, unless another argument names it.
        indices: Entry with the sample indices. Default: those of :func:`~lightning_rkd.data.indexing.with_indices`.
        weight: Weight of all relational terms, a number or a function of the epoch.
        task_weight: Weight of the task loss, a number or a function of the epoch.
        gather: Whether relations, and a task loss on embeddings, span the batches of all ranks.
        balance: Ratio of the norms of each term's gradient and the task loss's, at the layer that the term reads, which
            is held in every step; see :class:`~lightning_rkd.RelationalDistillation`. The resulting weights are logged
            as ``balance/<term>``. ``None`` applies the weights unchanged.
        compare_gradients: When ``gradient/<term>`` is logged, the same ratio for the weights as they are: ``"once"``,
            ``"epoch"``, ``"step"`` or ``None``; see :class:`~lightning_rkd.RelationalDistillation`. Above 5 or below
            1/50 a warning says which weight would make both equal.
        micro_batch: Largest number of samples that the networks process at once in training. A larger batch is split
            into micro-batches, while losses and gradients are those of the whole batch: memory is that of one
            micro-batch, at the cost of a second forward pass of the student. See
            :class:`~lightning_rkd.MicroBatches` for inputs and BatchNorm. ``None`` processes the batch at once.

    Raises:
        ValueError: When a fit begins: a loss without a teacher, neither loss nor task loss, or a frozen student.
        NonFiniteError: NaN or infinity in an output (the message names network, row and step), in a loss, or in the
            weights when a checkpoint is about to be written.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_rkd.losses.rkd import RKD
        >>> module = DistillationModule(nn.Linear(8, 2), teacher=nn.Linear(8, 4), loss=RKD())
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", **quiet)
        >>> loader = DataLoader(TensorDataset(torch.randn(16, 8)), batch_size=16)
        >>> trainer.fit(module, loader, loader)
        >>> sorted(trainer.callback_metrics), module(torch.ones(3, 8)).shape
        (['distill/rkd', 'train/loss'], torch.Size([3, 2]))
    """

    unwraps_batches = True  # read by callbacks, which do so for other modules

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
        gallery: Searched | StoredGallery = "student",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: nn.Module | Callable[[Batch], Batch] | None = None,
        student_layer: Layer | None = None,
        teacher_layer: Layer | None = None,
        input_layer: str | None = None,
        inputs: Keys | None = None,
        teacher_inputs: Keys | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
        weight: Weight = 1.0,
        task_weight: Weight = 1.0,
        gather: bool = True,
        balance: float | None = None,
        compare_gradients: Compare | None = "once",
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        if balance is not None and task_loss is None:
            raise ValueError("balance compares the terms with a task loss: pass task_loss=..., or leave balance out")
        check_size("micro_batch", micro_batch)
        save_plain_hyperparameters(self, inspect.currentframe())
        self.student, self.task_loss, self.miner = student, task_loss, miner
        self.loss = LossSum(loss) if isinstance(loss, dict) else loss
        self.metrics = nn.ModuleDict(choose_gallery(metrics or {}, gallery))
        self.task_reads, self.batch_transform, self.task_weight = task_reads, batch_transform, task_weight
        self._gradients = GradientBalance(balance, compare_gradients)
        self.micro_batch = micro_batch
        self._optimizer, self._lr_scheduler, self._lr_interval = optimizer, lr_scheduler, lr_interval
        self._keys: dict[str, Any] = {
            "inputs": inputs,
            "teacher_inputs": teacher_inputs,
            "labels": labels,
            "indices": indices,
        }
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
        self._absent: dict[str, str] = {}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a module from a checkpoint.

        ``kwargs`` are the arguments of the module that are not saved: the student, and to train on also teacher, losses
        and all other arguments that are not plain values. Under the command line all but the teacher are saved.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except TypeError as error:
            absent = re.findall(r"'(\w+)'", str(error)) if "required" in str(error) else []
            if not absent:
                raise
            given = ", ".join(f"{name}=..." for name in absent)
            raise TypeError(
                f"networks and losses are not saved: pass them as when the module was made, "
                f"{cls.__name__}.load_from_checkpoint(path, {given}), and to train on also teacher=, loss=, task_loss="
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the names of the losses."""
        checkpoint["losses"] = self._name_losses()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find losses that were trained with and are missing now."""
        own = self._name_losses()
        self._absent = {name: loss for name, loss in checkpoint.get("losses", {}).items() if name not in own}

    def _name_losses(self) -> dict[str, str]:
        given = {"loss": self.loss, "task_loss": self.task_loss, "miner": self.miner}
        return {name: type(loss).__name__ for name, loss in given.items() if loss is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the student."""
        return self.student(*args, **kwargs)

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def configure_optimizers(self) -> Any:
        """Optimizer of all trainable parameters, and the learning rate scheduler if there is one."""
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
            self._gradients.reset()
            if self.loss is None and self.task_loss is None:
                raise ValueError("nothing to train with: pass task_loss=..., or teacher=... and loss=...")
            if not any(p.requires_grad for p in self.student.parameters()):
                raise ValueError("the student is frozen: none of its parameters requires a gradient")
        measured = [name for name, metric in self._metrics().items() if uses_teacher(metric)]
        if measured and stage != "predict" and self.distiller.teacher is None:
            raise ValueError(f"the metrics {measured} compare with the teacher: pass teacher=..., or leave them out")
        teach = stage != "predict" and bool(measured or (stage == "fit" and self.loss is not None))
        self.distiller.attach(self.student, teach=teach)
        if stage != "predict":
            warn_if_not_aligned(self._metrics(), [term.loss for term in self.distiller.losses.values()])
        if stage == "fit":
            if self.distiller.teacher_needs_indices:
                if self.batch_transform is not None:
                    raise ValueError(
                        f"batch_transform={type(self.batch_transform).__name__} changes the images of a batch, and a "
                        "cached teacher has never seen the changed ones: leave it out, or teach with Teacher(network)"
                    )
                if self._keys["indices"] is None:
                    self._undo_numbers = wrap_train_dataloader(self.trainer, number_batches)
            materialize_losses(self)
            exclude_from_ddp_broadcast(self)

    @property
    def needs_indices(self) -> bool:
        """True if a loss or the teacher needs the indices of the samples; read by our data modules."""
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
        """Move the teacher to the student's device, and check checkpoint, optimizers and strategy."""
        if self._absent:
            given = ", ".join(f"{name}={loss}(...)" for name, loss in self._absent.items())
            rank_zero_warn(f"training goes on without what the checkpoint was trained with: to keep it, pass {given}")
        prepare_fit(self.distiller, self.trainer, self, self.unpack)
        refuse_lbfgs(self.trainer.optimizers, self.distiller.stateful_losses)
        refuse_unsynchronised(self.distiller, self.trainer.strategy)
        refuse_balance(self._gradients, self.trainer.strategy)

    def on_train_start(self) -> None:
        """Move the teacher, since Lightning's learning rate finder trains before ``on_fit_start``."""
        prepare_fit(self.distiller, self.trainer, self, self.unpack)

    def on_train_end(self) -> None:
        """Report what the checks of the last steps have found."""
        self.distiller.finish()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the weighted sum of task loss and relational terms."""
        features, output, terms = self.forward_both(batch)
        logged = {f"distill/{name}": value for name, value in terms.items()}
        parts = []
        if self.task_loss is not None:
            task = self.task(features, output)
            logged["train/task"] = task
            parts.append(evaluate_weight(self.task_weight, self.current_epoch) * task)
        self.distiller.check_losses(logged, self.global_step)
        if terms and parts:
            self._apply_balance(terms, parts[0], features)
        loss = torch.stack([*parts, *terms.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({name: value.detach() for name, value in logged.items()})
        return loss

    def forward_both(self, batch: Any) -> tuple[StepFeatures, Any, dict[str, Tensor]]:
        """Run both networks on a batch; returns their features, the student's output, and the relational terms."""
        given = to_batch(batch, self.unpack)
        if self.batch_transform is not None:
            given = self.batch_transform(given)
        self.distiller.start()
        parts = 1
        if self.micro_batch is not None:
            counts = gather_row_counts(count_rows(given.inputs), self.device, self.distiller.group)
            parts = count_parts(counts, self.micro_batch)
        if parts == 1:
            output = call_network(self, given.inputs)
        else:
            inputs, repeating = split_rows(given.inputs, parts), self.distiller.repeating
            output = run_parts(partial(call_network, self), inputs, self.student, repeating)
        features = self.distiller.collect(given, teach=self.loss is not None, parts=parts)
        terms = self.distiller.compute_terms(features, epoch=self.current_epoch, step=self.global_step)
        return features, output, terms

    def _apply_balance(self, terms: dict[str, Tensor], task: Tensor, features: StepFeatures) -> None:
        """Balance and compare the terms of a step."""
        trainer = self.trainer
        logs = writes_logs(trainer) or trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
        apply_balance(self._gradients, terms, task, features, self.distiller, self, logs=logs)

    def task(self, features: StepFeatures, output: Any) -> Tensor:
        """Compute the task loss, on the embeddings of all ranks or on the rank's own logits."""
        assert self.task_loss is not None
        labels = features.batch.labels
        if labels is None:
            raise ValueError("the task loss needs labels, but the batch has none: say where they are, labels=...")
        read = features.embedding.embedding if self.task_reads == "embedding" else output
        if not isinstance(read, Tensor):
            cure = f"gives {type(read).__name__} and no logits: return them from its forward"
            if self.task_reads == "embedding":
                cure = "has no embedding at its taps: add one, student_layer={'embedding': ..., ...}"
            raise ValueError(f"for the task loss the student {cure}, or override task(features, output)")
        if self.task_reads == "embedding" and features.views > 1:
            labels = torch.cat([labels] * features.views)
        if (rows := features.batch.task_rows) is not None:
            read, labels = read[rows], labels[rows]
        read = read if read.dtype == torch.float64 else read.float()
        group, ranks = self.distiller.group, rank_and_size(self.distiller.group)[1]
        share = 1.0
        if self.distiller.gather and ranks > 1:
            counts = gather_row_counts(len(read), read.device, group)
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
        given = to_batch(batch, self.unpack)
        self.distiller.start()
        output = call_network(self, given.inputs)
        features = self.distiller.collect(given, teach=self._evaluation.uses_teacher(dataloader_idx))
        logits = output if isinstance(output, Tensor) else None
        student = Outputs(embedding=features.embedding.embedding, logits=logits)
        self._evaluation.update(dataloader_idx, student, given, features.teacher_embedding)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Compute the embedding of a batch."""
        given = to_batch(batch, self.unpack)
        self.distiller.start()
        call_network(self, given.inputs)
        return self.distiller.collect(given, teach=False).embedding.embedding

    def on_validation_start(self) -> None:
        """Empty the metrics."""
        losses = [term.loss for term in self.distiller.losses.values()]
        self._evaluation = start_evaluation(self._metrics(), self.trainer, self, self.distiller, losses, self.unpack)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and empty them."""
        log_evaluation(self._evaluation, self.trainer, self)

    test_step = validation_step
    on_test_start = on_validation_start
    on_test_epoch_end = on_validation_epoch_end

    def _metrics(self) -> dict[str, Metric]:
        return dict(self.metrics.items())  # type: ignore[arg-type] # a ModuleDict of metrics
