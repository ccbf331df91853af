"""Relational distillation of any LightningModule, without a change to its code."""

import itertools
import pickle
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_rkd.callbacks.attached_losses import AttachedLosses, join_optimizer, losses_with_tensors
from lightning_rkd.callbacks.base import Callback
from lightning_rkd.callbacks.method_patch import MethodPatch, unwrap_batches
from lightning_rkd.data.indexing import IndexedBatch, to_batch
from lightning_rkd.data.loaders import count_samples, number_batches
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.finite_checks import refuse_broken_weights
from lightning_rkd.distillation.gradient_balance import Compare, GradientBalance
from lightning_rkd.distillation.layers import CaptureError, Layer, LayerNotFoundError, find_layer
from lightning_rkd.distillation.lightning import (
    apply_balance,
    configure_model,
    exclude_from_ddp_broadcast,
    lightning_base,
    prepare_fit,
    refuse_averages,
    refuse_balance,
    refuse_lbfgs,
    refuse_unsynchronised,
)
from lightning_rkd.distillation.teachers import BaseTeacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import LossSum, Weight, evaluate_weight
from lightning_rkd.utils.private import wrap_train_dataloader, writes_logs
from lightning_rkd.utils.types import Batch, Key, Keys, unpack

_numbers = itertools.count()
_DETACHED = {"_module": None, "_attached": None, "_prepared": False, "_batch": None, "_backwards": None}


class RelationalDistillation(Callback):
    r"""Distils a teacher into the module that a Trainer trains.

    In every training step the callback adds the distillation terms to the loss that ``training_step`` returns, or, with
    manual optimisation, to the loss passed to ``manual_backward``:

    .. math:: L = w_{task} L_{task} + w \sum_k w_k L_k(s, t)

    where s are the features of ``student_layer`` and t those of the teacher for the same inputs. Training is
    numerically identical to adding the loss in ``training_step``: gradient accumulation, clipping, precision and
    strategies apply to the sum. The terms are logged as ``distill/<name>``, in every ``log_every_n_steps``-th step and
    in the last one of an epoch.

    A loss with parameters or buffers (projectors, memory banks) is a submodule of the module during the fit, so that it
    is moved, cast and synchronised with it. Its parameters join the first parameter group of the optimizer, unless an
    optimizer already holds them. They are saved in the callback's state, not in the module's ``state_dict``. Such a
    loss needs its sizes as arguments. If two callbacks read the same layers with losses of the same names, name the
    losses of one: ``loss={"name": ...}``.

    Args:
        teacher: The teacher: a network, a :class:`~lightning_rkd.Teacher`, a :class:`~lightning_rkd.CachedTeacher`, or
            an :class:`~lightning_rkd.EnsembleTeacher` of several. It does not become part of the module, its
            checkpoints or its optimizers.
        loss: A loss, a sum such as ``25 * RKDDistance() + 50 * RKDAngle()``, or a dict of losses.
        student_layer: Layer of the student whose features the loss compares: a dotted path in the module, a function
            from module to submodule, a :class:`~lightning_rkd.Tap`, a list of paths (feature maps), or a dict of named
            taps. A layer gives its output, whatever its class; ``Tap(layer, at="classifier")`` reads a head.
        teacher_layer: The same for the teacher; ``None`` reads its output.
        input_layer: Layer of the student whose inputs the teacher receives, call by call. It is needed if the step
            augments, permutes or mixes its inputs, runs several views, or draws batches itself. ``None`` passes the
            inputs of the batch; the first two steps warn if the student's inputs are not its rows in order.
        inputs: Entry of a batch with the inputs: a position, a key, a field of a named tuple or dataclass, or a dotted
            path such as ``"views.global"``; or several, in any form of :data:`~lightning_rkd.utils.types.Keys`.
            Required if batches are mappings or dataclasses; default: the first entry.
        teacher_inputs: Entries with the inputs of the teacher, in the same forms; ``None`` passes it ``inputs``.
        labels: Entry with the labels. Default: the second entry of a sequence, unless another argument names it.
        indices: Entry with the sample indices. Default: those of :func:`~lightning_rkd.data.indexing.with_indices`.
        weight: Weight of all terms, a number or a function of the epoch.
        task_weight: Weight of the module's own loss, a number or a function of the epoch.
        gather: Whether relations span the batches of all ranks, so that k devices compute the same loss as one device
            with the whole batch.
        balance: Ratio of gradient norms. In every step each term is scaled such that the norm of its gradient at the
            layer it reads is ``balance`` (times the weight of the term) times that of the gradient of the module's own
            loss there. The resulting weights are logged as ``balance/<term>`` and can serve as fixed ones later.
            ``None`` applies the weights unchanged. With manual optimisation, the own loss is the one passed to the
            chosen ``manual_backward``.
        compare_gradients: When ``gradient/<term>`` is logged, the gradient norm of the weighted term at the layer it
            reads, divided by that of the module's own loss: ``"once"``, in the first logged step after step 10,
            ``"epoch"``, also in the first one of every epoch, or ``"step"``, in every logged step. Above 5 or below
            1/50 a warning says which weight would make both equal. It costs two backward passes per term between
            layer and loss. ``None`` never compares; nor is it done under strategies that shard parameters, or where
            the graph between layer and loss is compiled or checkpointed.
        manual_backward_index: Number, from 0, of the ``manual_backward`` call that receives the terms, for manual
            optimisation with several calls in a step. The features are those recorded since the previous call, or, if
            the layer has not run since, those recorded earlier in the step.
        absent: Treatment of steps in which the student layer does not run, on any rank: alternating tasks, or a
            ``CombinedLoader`` with ``None`` batches. ``"error"`` raises ``CaptureError``, ``"skip"`` trains the
            module's own loss alone.

    Raises:
        ValueError: When a fit begins: a layer that does not exist, or a student layer that is the module itself. In the
            first step: a loss without its sizes; the message states them.
        CaptureError: In a step: the layer was not called, has no gradient, or was called several times without
            ``input_layer``.
        NonFiniteError: NaN or infinity in the features of student or teacher (the message names network, row and step),
            or in the module's weights when a checkpoint is about to be written. The module's own loss is not checked.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> from torch import nn
        >>> from lightning_rkd.losses.rkd import RKD
        >>> callback = RelationalDistillation(teacher=nn.Linear(8, 4), loss=RKD(), student_layer="backbone")
        >>> trainer = pl.Trainer(callbacks=[callback], accelerator="cpu")
        >>> list(callback.distiller.losses)  # logged as distill/rkd
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
        inputs: Keys | None = None,
        teacher_inputs: Keys | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
        weight: Weight = 1.0,
        task_weight: Weight = 1.0,
        gather: bool = True,
        balance: float | None = None,
        compare_gradients: Compare | None = "once",
        manual_backward_index: int | None = None,
        absent: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if absent not in ("error", "skip"):
            raise ValueError(f"absent must be 'error' or 'skip', got {absent!r}")
        self.distiller = Distiller(
            teacher,
            loss,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            input_layer=input_layer,
            weight=weight,
            gather=gather,
        )
        self.task_weight, self.absent = task_weight, absent
        self._gradients = GradientBalance(balance, compare_gradients)
        self.manual_backward_index = manual_backward_index
        self._keys: dict[str, Any] = {
            "inputs": inputs,
            "teacher_inputs": teacher_inputs,
            "labels": labels,
            "indices": indices,
        }
        self._number = next(_numbers)
        self._module: pl.LightningModule | None = None
        self._attached: AttachedLosses | None = None
        self._prepared = False
        self._undo: list[Callable[[], None]] = []
        self._batch: Any = None
        self._backwards: int | None = None  # None outside a step

    def __getstate__(self) -> dict[str, Any]:
        """State of copies and pickles, which are not attached to a module."""
        return self.__dict__ | _DETACHED | {"_undo": []}

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of other types."""
        return unpack(batch, **self._keys)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the student and patch its step, in each process after it has been spawned."""
        if stage != "fit":
            return
        self._detach()
        self._gradients.reset()
        self._module = pl_module
        try:
            self.distiller.attach(pl_module)
        except LayerNotFoundError:
            if not is_overridden("configure_model", pl_module, lightning_base(pl_module)):
                raise
            configure_model(trainer, pl_module)  # Lightning does so after this hook; it may be called twice
            self.distiller.attach(pl_module)
        if any(layer is pl_module for layer in self._find_student_layers(pl_module)):
            raise ValueError("student_layer must name a layer inside the module, not the module itself")
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        earlier = list(itertools.takewhile(lambda callback: callback is not self, callbacks))
        self._refuse_shared_names(earlier)
        self._undo = [MethodPatch.add(pl_module, "training_step", self._around_step), *unwrap_batches(pl_module)]
        if self.distiller.teacher_needs_indices and self._keys["indices"] is None:
            self._undo.append(wrap_train_dataloader(trainer, number_batches))
        if not pl_module.automatic_optimization:
            self._undo.append(MethodPatch.add(pl_module, "manual_backward", self._around_backward))
        if not self.distiller.missing_sizes:
            self.distiller.materialize()
        if own := losses_with_tensors(self.distiller.losses):
            refuse_averages(earlier, f"name the {type(self).__name__} callback before it")
            self._attached = AttachedLosses(own)
            self._undo += [self._attached.attach(pl_module), exclude_from_ddp_broadcast(pl_module)]

    @property
    def needs_indices(self) -> bool:
        """True if a loss or the teacher needs the indices of the samples; read by our data modules."""
        return self.distiller.needs_indices

    @cached_property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint, from its losses and layers."""
        if not losses_with_tensors(self.distiller.losses):
            return f"{type(self).__qualname__}#{self._number}"
        layers = [tap.layer for taps in self.distiller.student.taps.values() for tap in taps]
        places = ", ".join(
            x if isinstance(x, str) else getattr(x, "__qualname__", type(x).__qualname__) for x in layers
        )
        return f"{type(self).__qualname__}({', '.join(self.distiller.losses)} at {places})"

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of the losses."""
        own = losses_with_tensors(self.distiller.losses)
        state = {f"{name}.{key}": x for name, loss in own.items() for key, x in loss.state_dict().items()}
        return {"losses": state} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load parameters and buffers of the losses."""
        for name, loss in losses_with_tensors(self.distiller.losses).items():
            start = f"{name}."
            loss.load_state_dict(
                {k.removeprefix(start): x for k, x in state_dict.get("losses", {}).items() if k.startswith(start)}
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Refuse weights that hold NaN, since the checkpoint would replace a good one."""
        refuse_broken_weights(pl_module, trainer.global_step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the teacher to the student's device, and add the parameters of losses to the optimizer."""
        refuse_lbfgs(trainer.optimizers, self.distiller.stateful_losses)
        refuse_unsynchronised(self.distiller, trainer.strategy)
        refuse_balance(self._gradients, trainer.strategy)
        if self._attached is not None:
            join_optimizer(self._attached, trainer.optimizers, pl_module, self._find_student_layers(pl_module))
        self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the training samples for the message about a loss that lacks their number."""
        if (samples := count_samples(trainer.train_dataloader)) is not None:
            self.distiller.known_sizes = {"num_samples": samples}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what the checks of the last steps have found."""
        self.distiller.finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module and the teacher."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module and the teacher, since Lightning does not call ``teardown`` after an exception."""
        self._detach()
        if "pickle" in str(exception):
            self._note_unpicklable(exception)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        prepare_fit(self.distiller, trainer, pl_module, self.unpack)
        self._prepared = True

    def _find_student_layers(self, module: nn.Module) -> list[nn.Module]:
        return [find_layer(module, tap.layer) for taps in self.distiller.student.taps.values() for tap in taps]

    def _refuse_shared_names(self, earlier: list[pl.Callback]) -> None:
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
        """Add the names of arguments that cannot be pickled for spawned processes to an error."""
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
                return self._add_to_result(result)
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
            loss = self._add_terms(loss)
        with self.distiller.paused():
            result = call(loss, *args, **kwargs)
        if number < chosen:
            self.distiller.restart()
        return result

    def _add_to_result(self, result: Any) -> Any:
        if result is None:  # the module skips this step
            return None
        if isinstance(result, Tensor):
            return self._add_terms(result)
        if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
            return {**result, "loss": self._add_terms(result["loss"])}
        raise TypeError(
            f"training_step must return a tensor, a dict with a tensor 'loss', or None, got {type(result).__name__}"
        )

    def _add_terms(self, task: Tensor) -> Tensor:
        module = self._module
        assert module is not None
        trainer = module.trainer
        epoch, step = trainer.current_epoch, trainer.global_step
        total = task if self.task_weight == 1 else evaluate_weight(self.task_weight, epoch) * task
        if self.absent == "skip" and not self.distiller.layers_ran():
            return total
        features = self.distiller.collect(self._unpack_batch())
        terms = self.distiller.compute_terms(features, epoch=epoch, step=step)
        logs = writes_logs(trainer) or trainer.is_last_batch or step + 1 == trainer.max_steps
        if logs:
            # equal on all ranks, so nothing is synchronised; batch_size=1 keeps Lightning from searching the batch
            values = {f"distill/{name}": value.detach() for name, value in terms.items()}
            module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        if logs or self._gradients.balance is not None:
            apply_balance(self._gradients, terms, total, features, self.distiller, module, logs=logs)
        for value in terms.values():
            total = total + value
        return total

    def _unpack_batch(self) -> Batch | None:
        given = self._batch
        if given is None or hasattr(given, "__next__"):  # no batch, or Lightning's dataloader_iter
            return None
        fed = self.distiller.inputs is not None and self._keys["teacher_inputs"] is None  # from input_layer
        if fed and not self.distiller.needs_context:
            return None
        return to_batch(given, self.unpack) if isinstance(given, IndexedBatch) else self.unpack(given)
