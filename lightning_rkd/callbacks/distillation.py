"""Adds a relational loss to the training step of any LightningModule, without a change to its code."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_rkd.callbacks.attached_losses import AttachedLosses, join_optimizer, losses_with_tensors
from lightning_rkd.callbacks.method_patch import MethodPatch, unwrap_batches
from lightning_rkd.data.indexing import IndexedBatch, to_batch
from lightning_rkd.data.loaders import count_samples
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.features import CaptureError, Layer, LayerNotFoundError, find_layer
from lightning_rkd.distillation.finite_checks import refuse_broken_weights
from lightning_rkd.distillation.lightning import (
    exclude_from_ddp_broadcast,
    number_training_batches,
    refuse_averages,
    refuse_lbfgs,
    refuse_unsynchronised,
)
from lightning_rkd.distillation.teachers import BaseTeacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import LossSum, Weight, evaluate_weight
from lightning_rkd.utils.distributed import data_parallel_group
from lightning_rkd.utils.private import call_configure_model, load_dataloaders
from lightning_rkd.utils.types import Batch, Key, unpack

_numbers = itertools.count()
_DETACHED = {"_module": None, "_attached": None, "_prepared": False, "_batch": None, "_backwards": None}


class RelationalDistillation(pl.Callback):
    r"""Distils a teacher into the module that a Trainer trains.

    The loss that ``training_step`` returns (or hands to ``manual_backward``) becomes

    .. math:: L = w_{task} L_{task} + w \sum_k w_k L_k(s, t)

    with s the features of ``student_layer`` in this step and t those of the teacher for the same inputs. Training is
    numerically identical to adding the loss in ``training_step``; accumulation, clipping, precision and strategies act
    on it as on any loss. Terms are logged as ``distill/<name>``.

    A loss with parameters or buffers (projectors, memory banks) is part of the module while it trains, so that devices,
    precision, DDP and ``self.parameters()`` include it; parameters that no optimizer holds join the first one's first
    group. It is saved as the callback's state and never in the module's ``state_dict``. Its sizes must be given. Two
    callbacks whose losses have the same names at the same layer need names of their own, ``loss={"a": ...}``.

    Args:
        teacher: The teacher: a network, a :class:`~lightning_rkd.Teacher`, a
            :class:`~lightning_rkd.CachedTeacher`, or an
            :class:`~lightning_rkd.EnsembleTeacher` of several. It stays out of the module, its checkpoints and
            its optimizers.
        loss: A loss, a sum such as ``25 * RKDDistance() + 50 * RKDAngle()``, or a dict of losses.
        student_layer: Where to read the student: a dotted path in the module, a function from module to submodule, a
            :class:`~lightning_rkd.distillation.features.Tap`, a list of paths (feature maps), or a dict of named taps.
        teacher_layer: The same for the teacher; ``None`` reads the teacher's output.
        input_layer: A student layer whose inputs feed the teacher, call by call: for augmentation inside the step,
            several views, or steps that never get a batch. ``None`` feeds the teacher the batch's inputs.
        inputs: Key of the inputs in the batch; needed where the batch is a mapping, default the first entry.
        labels: Key of the labels; default the second entry of a sequence.
        indices: Key of the sample indices; default those of :func:`~lightning_rkd.data.indexing.with_indices`.
        weight: Weight of all terms, a number or a function of the epoch.
        task_weight: Weight of the module's own loss, likewise.
        gather: Whether relations span the batches of all ranks (k devices then equal one big batch).
        manual_backward_index: With manual optimisation and several ``manual_backward`` calls in a step: the number of
            the call (from 0) that receives the terms. They are computed from the features since the call before it,
            or, where the layer has not run since, from those earlier in the step.

    Raises:
        ValueError: At fit: a layer that does not exist, or a student layer that is the module itself. In the first
            step: a loss that does not know its sizes; the message states them.
        CaptureError: In a step: the layer was not called, gave no gradient, or was called several times without
            ``input_layer``.
        NonFiniteError: NaN or infinity in the features of student or teacher, with network, row and step; or in the
            module's weights when a checkpoint is about to be written. The module's own loss is not checked: if it is
            NaN, that appears in one of these ways.

    Reference:
        Park, Kim, Lu, Cho. Relational Knowledge Distillation. CVPR 2019. arXiv:1904.05068.

    Example:
        >>> from torch import nn
        >>> from lightning_rkd.losses.rkd import RKD
        >>> callback = RelationalDistillation(teacher=nn.Linear(8, 4), loss=RKD(), student_layer="backbone")
        >>> sorted(callback.distiller.losses)
        ['rkd']
    """

    def __init__(
        self,
        teacher: BaseTeacher | nn.Module,
        loss: RelationalLoss | LossSum | dict[str, RelationalLoss | LossSum],
        *,
        student_layer: Layer,
        teacher_layer: Layer | None = None,
        input_layer: str | Callable[[nn.Module], nn.Module] | None = None,
        inputs: Key | list[str] | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
        weight: Weight = 1.0,
        task_weight: Weight = 1.0,
        gather: bool = True,
        manual_backward_index: int | None = None,
    ) -> None:
        super().__init__()
        self.distiller = Distiller(
            teacher,
            loss,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            input_layer=input_layer,
            weight=weight,
            gather=gather,
        )
        self.task_weight = task_weight
        self.manual_backward_index = manual_backward_index
        self._keys: dict[str, Any] = {"inputs": inputs, "labels": labels, "indices": indices}
        self._number = next(_numbers)
        self._module: pl.LightningModule | None = None
        self._attached: AttachedLosses | None = None
        self._prepared = False
        self._undo: list[Callable[[], None]] = []
        self._batch: Any = None
        self._backwards: int | None = None  # None outside a step

    def __getstate__(self) -> dict[str, Any]:
        """State of copies and pickles, which are attached to nothing."""
        return self.__dict__ | _DETACHED | {"_undo": []}

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the student and patch its step; runs in the worker, so that a spawned module is pickled clean."""
        if stage != "fit":
            return
        self._detach()
        self._module = pl_module
        try:
            self.distiller.attach(pl_module)
        except LayerNotFoundError:
            if not is_overridden("configure_model", pl_module, pl.LightningModule):
                raise
            call_configure_model(trainer)  # Lightning does so after this hook; it may be called twice
            self.distiller.attach(pl_module)
        for tap in (tap for taps in self.distiller.student.taps.values() for tap in taps):
            if find_layer(pl_module, tap.layer) is pl_module:
                raise ValueError("student_layer must name a layer inside the module, not the module itself")
        self._refuse_names_of_others(trainer)
        self._undo = [MethodPatch.add(pl_module, "training_step", self._around_step), *unwrap_batches(pl_module)]
        if self.distiller.teacher_needs_indices and self._keys["indices"] is None:
            self._undo.append(number_training_batches(trainer))
        if not pl_module.automatic_optimization:
            self._undo.append(MethodPatch.add(pl_module, "manual_backward", self._around_backward))
        self.distiller.known_sizes = {}
        if not self.distiller.missing_sizes:
            self.distiller.materialize()
        if own := losses_with_tensors(self.distiller.losses):
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
            earlier = itertools.takewhile(lambda callback: callback is not self, callbacks)
            refuse_averages(earlier, f"name the {type(self).__name__} callback before it")
            self._attached = AttachedLosses(own)
            self._undo += [self._attached.attach(pl_module), exclude_from_ddp_broadcast(pl_module)]

    @property
    def needs_indices(self) -> bool:
        """Whether a loss or the teacher needs the indices of the samples; read by our data modules."""
        return self.distiller.needs_indices

    @cached_property
    def state_key(self) -> str:
        """Tells the callbacks in a checkpoint apart, by their losses and layers."""
        if not losses_with_tensors(self.distiller.losses):
            return f"{type(self).__qualname__}#{self._number}"
        taps = (tap.layer for taps in self.distiller.student.taps.values() for tap in taps)
        places = ", ".join(
            layer if isinstance(layer, str) else getattr(layer, "__qualname__", type(layer).__qualname__)
            for layer in taps
        )
        return f"{type(self).__qualname__}({', '.join(self.distiller.losses)} at {places})"

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of the losses."""
        own = losses_with_tensors(self.distiller.losses)
        state = {f"{name}.{key}": x for name, loss in own.items() for key, x in loss.state_dict().items()}
        return {"losses": state} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load them."""
        for name, loss in losses_with_tensors(self.distiller.losses).items():
            start = f"{name}."
            loss.load_state_dict(
                {k.removeprefix(start): x for k, x in state_dict.get("losses", {}).items() if k.startswith(start)}
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Refuse weights that hold NaN: the checkpoint would replace a good one."""
        refuse_broken_weights(pl_module, trainer.global_step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the teacher to the student's device, and add the parameters of losses to the optimizer."""
        refuse_lbfgs(trainer.optimizers, self.distiller.stateful_losses)
        refuse_unsynchronised(self.distiller.losses, trainer.strategy, self.distiller.gather)
        if self._attached is not None:
            join_optimizer(self._attached, trainer.optimizers)
        self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the training samples, for the message about a loss that does not know their number."""
        if (samples := count_samples(trainer.train_dataloader)) is not None:
            self.distiller.known_sizes = {"num_samples": samples}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what the checks of the last steps have found."""
        self.distiller.finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module and the teacher."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module and the teacher; Lightning calls no ``teardown`` here."""
        self._detach()
        if "pickle" in str(exception):
            self._note_unpicklable(exception)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.distiller.prepare(
            pl_module.device, trainer.precision_plugin.convert_module, data_parallel_group(trainer.strategy)
        )
        if self.distiller.teacher_needs_indices:
            with isolate_rng(include_cuda=False):
                self.distiller.prepare_data(load_dataloaders(trainer), self.unpack)
        self._prepared = True

    def _refuse_names_of_others(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        earlier = itertools.takewhile(lambda callback: callback is not self, callbacks)
        others = [callback.distiller for callback in earlier if isinstance(callback, RelationalDistillation)]
        if both := sorted({name for other in others for name in other.losses} & set(self.distiller.losses)):
            raise ValueError(
                f"two {type(self).__name__} callbacks would log {', '.join(f'distill/{name}' for name in both)}: give "
                f"the losses names of their own, such as loss={{'{both[0]}_2': ...}}"
            )

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        vars(self).update(self.__getstate__())
        self.distiller.detach()

    def _note_unpicklable(self, exception: BaseException) -> None:
        """Name the arguments that cannot be pickled for spawned processes."""
        given = {
            "student_layer": self.distiller.student.taps,
            "teacher_layer": self.distiller.teacher_layer,
            "input_layer": self.distiller.inputs,
            "weight": self.distiller.weight,
            "task_weight": self.task_weight,
            "loss": self.distiller.losses,
        }
        for name, value in given.items():
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, AttributeError, TypeError):
                exception.add_note(
                    f"{name}, or something in it, cannot be sent to spawned processes: give a function that is defined "
                    "at the top of a module, no lambda; or train with strategy='ddp'"
                )

    def _around_step(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self._module is not None
        if not self._module.trainer.training:  # a validation_step may call it, for its loss
            return call(*args, **kwargs)
        if not self._prepared:  # Lightning's learning rate finder trains before on_fit_start, without callbacks
            self._prepare(self._module.trainer, self._module)
        self._batch, self._backwards = (args[0] if args else None), 0
        self.distiller.start()
        try:
            result = call(*args, **kwargs)
            if self._module.automatic_optimization:
                return self._with_terms(result)
            if self._backwards == 0:
                raise CaptureError(
                    "manual optimisation, but the step never called self.manual_backward(loss): the terms are added "
                    "there, a plain loss.backward() cannot carry them"
                )
            if self.manual_backward_index is not None and self.manual_backward_index >= self._backwards:
                raise CaptureError(
                    f"manual_backward_index={self.manual_backward_index}, but the step called manual_backward "
                    f"{self._backwards} time(s), counted from 0"
                )
            return result
        finally:
            self.distiller.discard()
            self._batch, self._backwards = None, None

    def _around_backward(self, call: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._backwards is None:
            return call(loss, *args, **kwargs)
        number, self._backwards = self._backwards, self._backwards + 1
        if number > 0 and self.manual_backward_index is None:
            raise CaptureError(
                "the step calls manual_backward several times: say which call receives the terms, "
                "manual_backward_index=0 for the first"
            )
        chosen = self.manual_backward_index or 0
        if number == chosen:
            loss = self._total(loss)
        with self.distiller.paused():
            result = call(loss, *args, **kwargs)
        if number < chosen:
            self.distiller.restart()
        return result

    def _with_terms(self, result: Any) -> Any:
        if result is None:  # the module skips this step
            return None
        if isinstance(result, Tensor):
            return self._total(result)
        if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
            return {**result, "loss": self._total(result["loss"])}
        raise TypeError(
            f"training_step must return a tensor, a dict with a tensor 'loss', or None, got {type(result).__name__}"
        )

    def _total(self, task: Tensor) -> Tensor:
        module = self._module
        assert module is not None
        epoch = module.current_epoch
        features = self.distiller.collect(self._unpack_batch())
        terms = self.distiller.compute_terms(features, epoch=epoch, step=module.global_step)
        # the values are those of the global batch, alike on all ranks: nothing to synchronise. Nor is anything averaged
        # over batches, so their size does not matter; but a step that draws its own batches must name one
        values = {f"distill/{name}": value.detach() for name, value in terms.items()}
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        total = task if self.task_weight == 1 else evaluate_weight(self.task_weight, epoch) * task
        for value in terms.values():
            total = total + value
        return total

    def _unpack_batch(self) -> Batch | None:
        given = self._batch
        if given is None or hasattr(given, "__next__"):  # no batch, or Lightning's dataloader_iter
            return None
        if self.distiller.inputs is not None and not self.distiller.needs_rows:
            return None  # the layer's inputs are enough
        return to_batch(given, self.unpack) if isinstance(given, IndexedBatch) else self.unpack(given)
