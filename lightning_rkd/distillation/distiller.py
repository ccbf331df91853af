"""The distillation engine: weighted loss terms from the features of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import FeatureReader, InputReader, Recorder
from lightning_rkd.distillation.finite_checks import FiniteChecks
from lightning_rkd.distillation.layers import CaptureError, Layer, LayerNotFoundError, find_layer
from lightning_rkd.distillation.micro_batches import split_rows
from lightning_rkd.distillation.row_check import RowCheck
from lightning_rkd.distillation.step import Needs, StepFeatures
from lightning_rkd.distillation.teachers.base import BaseTeacher
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.functional._kernels import load
from lightning_rkd.losses.base import NonFiniteError, RelationalLoss
from lightning_rkd.losses.inputs import combine_fields, resolve_taps, select_fields, select_maps
from lightning_rkd.losses.lazy import Size
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.losses.weighting import LossSum, Term, Weight, evaluate_weight, terms_of
from lightning_rkd.utils.distributed import Group, Shard, gather_row_counts, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs, first_tensor

_CURES = {
    "labels": "but the batch has none: say where they are, labels=...",
    "indices": "the row of every sample in the training set: wrap the training loader, with_indices(loader), or name "
    "them in the batch, indices=...",
    "mix": "but the batch was not mixed: pass batch_transform=MixUp() to DistillationModule",
}


@dataclass(frozen=True, slots=True)
class BoundLoss:
    """A loss with its weight, the taps it reads, and what it needs of the batch: the same from step to step."""

    name: str
    loss: Any
    weight: Weight
    student_taps: Mapping[str, str]
    teacher_taps: Mapping[str, str]
    needs: frozenset[str]

    @classmethod
    def bind(cls, name: str, term: Term, student_taps: Collection[str], teacher_taps: Collection[str]) -> BoundLoss:
        """Resolve the taps that a term reads."""
        loss, both = term.loss, (list(student_taps), list(teacher_taps))
        student, teacher = (resolve_taps(taps, term.tap, loss.reads, who=name) for taps in both)
        return cls(name, loss, term.weight, student, teacher, loss.needs - {"epoch", "shard"})

    def student_tensors(self, student: Mapping[str, Outputs]) -> list[Tensor]:
        """Tensors of the student that the loss reads."""
        outputs, reads = combine_fields(student, self.student_taps), self.loss.reads
        return self.list_tensors((outputs.feature_maps or []) if reads == "feature_maps" else outputs)

    def list_tensors(self, inputs: Any) -> list[Tensor]:
        """Tensors that the loss reads in what :meth:`select_inputs` gives of one network."""
        if isinstance(inputs, Outputs):
            return inputs.tensors(self.loss.reads)
        if isinstance(inputs, Tensor):
            return [inputs]
        return [x for x in select_maps(inputs, self.loss.feature_maps, who=self.name) if isinstance(x, Tensor)]

    def select_inputs(self, student: Mapping[str, Outputs], teacher: Mapping[str, Outputs]) -> tuple[Any, Any]:
        """Select what the loss reads of both networks: one field, or ``Outputs`` for several fields.

        If the field is missing, the whole ``Outputs`` is returned, and the loss raises an error with the cure.
        """
        reads = self.loss.reads
        if isinstance(reads, str):
            s, t = student[self.student_taps[reads]], teacher[self.teacher_taps[reads]]
            of_student, of_teacher = getattr(s, reads), getattr(t, reads)
            return (s if of_student is None else of_student), (t if of_teacher is None else of_teacher)
        return combine_fields(student, self.student_taps), combine_fields(teacher, self.teacher_taps)

    def check_context(self, context: Mapping[str, Any]) -> None:
        """Raise ``CaptureError`` if a required input of the loss is missing; the message says how to provide it."""
        for key in sorted(self.loss.required & set(_CURES)):
            if context[key] is None:
                raise CaptureError(f"{self.name}: {type(self.loss).__name__} needs {key}, {_CURES[key]}")


class Distiller:
    """Computes the loss terms of a distillation: it reads features, runs the teacher, gathers rows and calls losses.

    ``DistillationModule`` and ``RelationalDistillation`` use a distiller, and so can a training loop in plain PyTorch,
    Fabric or a Hugging Face Trainer:

    1. ``with`` :meth:`attached` hooks the layers of student and teacher and moves the teacher to the student's device;
       at the end it removes the hooks and restores the teacher. (:meth:`attach`, :meth:`prepare`, :meth:`finish` and
       :meth:`detach` are its parts.) Losses with parameters are created by :meth:`materialize`; pass their parameters
       to the optimizer.
    2. In every step, :meth:`start` begins to record, the student runs, and :meth:`compute_terms` runs the teacher on
       the same inputs and returns the weighted losses by name, to be added up. All ranks take part.

    Args:
        teacher: A network or a teacher; ``None`` is allowed without a loss.
        loss: A loss, a sum of losses, or a dict of losses; ``None`` computes no terms.
        student_layer: Layer of the student whose features the losses read; ``None`` reads its output. A layer gives its
            output, whatever its class; ``Tap(layer, at="classifier")`` reads a head.
        teacher_layer: Layer of the teacher whose features the losses read; ``None`` reads its output.
        input_layer: Layer of the student whose inputs the teacher receives, call by call; ``None`` passes the inputs of
            the batch.
        weight: Weight of all terms, a number or a function of the epoch.
        gather: Whether relations span the rows of all ranks.

    Attributes:
        losses: Registered losses by log name, each with its weight and tap.
        group: Process group over which batches are split; ``None`` for the default group.

    Raises:
        ValueError: A loss reads a tap that does not exist, or cannot be computed from the teacher's features.

    Example:
        >>> from lightning_rkd.losses.rkd import RKD
        >>> student, teacher = nn.Linear(4, 2), nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> distiller = Distiller(teacher, RKD())
        >>> with distiller.attached(student, device="cpu"):
        ...     for x in torch.randn(5, 8, 4):
        ...         distiller.start()
        ...         output = student(x)
        ...         terms = distiller.compute_terms(Batch(x))
        ...         optimizer.zero_grad()
        ...         sum(terms.values()).backward()
        ...         optimizer.step()
        >>> list(terms)
        ['rkd']
    """

    def __init__(
        self,
        teacher: BaseTeacher | nn.Module | None,
        loss: RelationalLoss | LossSum | Mapping[str, RelationalLoss | LossSum] | None,
        *,
        student_layer: Layer | None = None,
        teacher_layer: Layer | None = None,
        input_layer: str | Callable[[nn.Module], nn.Module] | None = None,
        weight: Weight = 1.0,
        gather: bool = True,
    ) -> None:
        if not (teacher is None or isinstance(teacher, BaseTeacher)):
            teacher = Teacher(teacher)
        # a copy, since several distillers may read one teacher at different layers
        self.teacher: BaseTeacher | None = copy(teacher)
        self.losses = {} if loss is None else terms_of(loss)
        self.teacher_layer, self.weight, self.gather = teacher_layer, weight, gather
        self.student = FeatureReader(student_layer, "student")
        self.inputs = None if input_layer is None else InputReader(input_layer)
        self._row_check = RowCheck(self.student)
        self._readers: list[Recorder] = [self.student] if self.inputs is None else [self.student, self.inputs]
        taps = {*self.student.taps, *(() if self.teacher is None else self.teacher.taps(teacher_layer))} - {""}
        for name, term in self.losses.items():
            if term.tap is not None and term.tap not in taps:
                raise ValueError(
                    f"the loss {name} is read at the tap {term.tap!r}, but the taps are {sorted(taps) or 'none'}; name "
                    f"it, student_layer={{{term.tap!r}: ...}}"
                )
        self._check_teacher_accepts()
        self.needs: frozenset[str] = frozenset().union(*(term.loss.needs for term in self.losses.values()))
        self.group: Group = None
        self.known_sizes: Mapping[str, Size] = {}  # for the message about a loss without sizes
        self.bound: dict[str, BoundLoss] = {}
        self._teaching, self._unsized, self._ranks = False, list(self.losses), 1
        self._device: torch.device | str = "cpu"
        self._checks = FiniteChecks()

    @contextmanager
    def attached(
        self,
        student: nn.Module,
        device: torch.device | str,
        convert: Callable[[nn.Module], nn.Module] | None = None,
        group: Group = None,
    ) -> Iterator[None]:
        """Attach and prepare for a ``with`` block, and detach at its end, also after an exception.

        Args:
            student: The student network itself: not the wrapper that DDP or Fabric put around it.
            device: Device of the student.
            convert: Function that casts the teacher; ``None`` leaves its precision.
            group: Process group over which batches are split.
        """
        try:
            self.attach(student)
            self.prepare(device, convert, group)
            yield
            self.finish()
        finally:
            self.detach()

    def attach(self, student: nn.Module, *, teach: bool = True) -> None:
        """Hook the layers of student and teacher, read the teacher's weights file, and resolve what each loss reads.

        With ``teach=False`` the teacher is left alone.
        """
        self.detach()
        if teach and self.teacher is None:
            raise ValueError("there is a loss but no teacher: pass teacher=..., or no loss")
        try:
            self.student.attach(student)
            if self.inputs is not None:
                self.inputs.attach(student)
        except LayerNotFoundError as error:
            other = getattr(self.teacher, "network", None)
            raise _explain_missing(error, other, "the teacher has it: teacher_layer=...") from None
        if teach and self.teacher is not None:
            if self.teacher.shares_parameters_with(student):
                raise ValueError(
                    "the teacher shares parameters with the student; teach with copy.deepcopy(network), or, if the "
                    "student is the frozen teacher with adapters, with Teacher(model, context=model.disable_adapter), "
                    "in which every shared parameter must be frozen"
                )
            try:
                self.teacher.attach(self.teacher_layer)
            except LayerNotFoundError as error:
                raise _explain_missing(error, student, "the student has it: student_layer=...") from None
            if self.inputs is None:
                self._row_check.attach(student)
            taps = self.student.taps, self.teacher.taps(self.teacher_layer)
            self.bound = {name: BoundLoss.bind(name, term, *taps) for name, term in self.losses.items()}
        related = [bound for bound in self.bound.values() if bound.loss.gather]
        self._gathered_needs = combine_needs(related)
        self._adds_context, self._teaching = self.needs_context, teach
        self._ranks = rank_and_size(self.group)[1]

    def prepare(
        self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None, group: Group = None
    ) -> None:
        """Move the teacher to the student's device and precision, and check that it is the same on all ranks.

        The arguments are those of :meth:`attached`; ``convert`` may be that of a Lightning precision plugin.
        """
        self.group, self._ranks, self._device = group, rank_and_size(group)[1], device
        if self.stateful_losses and not self.gather and self._ranks > 1:
            raise ValueError(
                f"gather=False, but the losses {self.stateful_losses} remember earlier rows, which must be the same on "
                "all ranks: leave gather=True"
            )
        self._check_teacher_accepts()  # again: some have created their tensors since
        self._unsized = [name for name, term in self.losses.items() if term.loss.missing_sizes]
        load(device)
        if self._teaching and self.teacher is not None and self.teacher.to(device, convert):
            self.teacher.check_same_on_ranks(group)

    def prepare_data(self, loaders: Any, unpack: Callable[[Any], Batch], *, train: bool = True) -> None:
        """Let the teacher check the loaders of a run, or read from them, after :meth:`prepare`. Collective."""
        if self._teaching and self.teacher is not None:
            self.teacher.prepare_data(loaders, unpack, self.group, train=train)

    def materialize(self, features: StepFeatures | None = None, num_samples: int | None = None) -> None:
        """Read files and create the tensors of all losses, before optimizers and DDP exist.

        Args:
            features: Features of any batch, to infer missing sizes from; ``None`` if the losses have their sizes.
            num_samples: Size of the training set.

        Raises:
            ValueError: A size of a loss is missing; the message states the known ones.
        """

        def materialize() -> None:
            for name, term in self.losses.items():
                loss, inputs = term.loss, (None, None)
                if features is not None and features.teachers and name in self.bound:
                    inputs = self.bound[name].select_inputs(features.student, features.teachers[0].features)
                    inputs = tuple(select_fields(x, loss.reads, who=type(loss).__name__) for x in inputs)
                loss.materialize(*inputs, num_samples=num_samples)

        run_on_all_ranks(materialize)  # a file may be missing on one machine

    def detach(self) -> None:
        """Remove all hooks and restore the teacher."""
        for reader in (*self._readers, self._row_check):
            reader.detach()
        if self.teacher is not None:
            self.teacher.detach()
        self._teaching, self.bound, self._checks = False, {}, FiniteChecks()

    @property
    def needs_indices(self) -> bool:
        """True if a loss or the teacher needs the indices of the samples."""
        return "indices" in self.needs or self.teacher_needs_indices

    @property
    def teacher_needs_indices(self) -> bool:
        """True if the teacher needs the indices of the samples."""
        return self.teacher is not None and self.teacher.needs_indices

    @property
    def teacher_needs_data(self) -> bool:
        """True if the teacher checks the loaders of a run, or reads from them."""
        return self.teacher is not None and self.teacher.needs_data

    @property
    def needs_context(self) -> bool:
        """True if a loss or the teacher needs labels, indices, view or mix of a batch."""
        return self.teacher_needs_indices or bool(self.needs & {"labels", "indices", "view", "mix"})

    @property
    def missing_sizes(self) -> frozenset[str]:
        """Sizes of losses that are not known yet."""
        return frozenset().union(*(term.loss.missing_sizes for term in self.losses.values()))

    @property
    def stateful_losses(self) -> list[str]:
        """Names of the losses with a state that changes from step to step, such as a memory bank."""
        return [n for n, t in self.losses.items() if any(isinstance(m, StepState) for m in t.loss.modules())]

    def weight_of(self, name: str, epoch: int) -> float:
        """Weight of a term in an epoch, times the weight of all terms."""
        return evaluate_weight(self.weight, epoch) * evaluate_weight(self.losses[name].weight, epoch)

    def start(self) -> None:
        """Start recording features, at the beginning of a step."""
        if self._checks.waiting:
            self._checks.report()
        for reader in self._readers:
            reader.start()
        if self._row_check.steps_left:
            self._row_check.start()

    def restart(self) -> None:
        """Start anew in the middle of a step; features recorded so far are used if no layer runs again."""
        for reader in self._readers:
            reader.restart()

    def discard(self) -> None:
        """Stop recording and discard the recorded features."""
        for reader in (*self._readers, self._row_check):
            if reader.on:
                reader.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause recording, for passes of the student that the losses shall not compare."""
        readers = [reader for reader in self._readers if reader.on]
        for reader in readers:
            reader.on = False
        try:
            yield
        finally:
            for reader in readers:
                reader.on = True

    def finish(self) -> None:
        """Raise ``NonFiniteError`` if the last steps had NaN or infinity; called at the end of training."""
        self._checks.report(wait=True)

    def check_losses(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Raise ``NonFiniteError`` if a loss is not finite, at once on a CPU and one step late on other devices."""
        self._checks.check_losses(losses, step)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Record and discard, for the second pass of a part of a step, which must do what the first one did."""
        for reader in self._readers:
            reader.start()
        try:
            yield
        finally:
            for reader in self._readers:
                reader.stop()

    def collect(self, batch: Batch | None, *, teach: bool = True, parts: int = 1) -> StepFeatures:
        """Collect the student's features since :meth:`start`, and compute those of the teacher for the same inputs.

        Args:
            batch: Batch of this rank. ``None`` for a step without a batch, which needs ``input_layer``.
            teach: Whether to run the teacher.
            parts: Number of parts of the batch on which the student has run, one after the other. A teacher that is a
                network runs on as many.

        Raises:
            CaptureError: The student layer was not called, or was called several times without ``input_layer``, or the
                networks give different numbers of rows.
        """
        if not (batch is None or isinstance(batch, Batch)):
            raise TypeError(f"collect takes a Batch, got {type(batch).__name__}: Batch(inputs, labels=...)")
        calls = None if self.inputs is None else self.inputs.collect(parts)
        student, views = self.student.collect(parts)
        features = StepFeatures(Batch(inputs=None) if batch is None else batch, student, (), views, parts)
        if not teach or self.teacher is None:
            return features
        if calls is None and batch is None:
            raise CaptureError("the step was given no batch: name the layer that feeds the teacher, input_layer=...")
        if calls is not None and features.batch.teacher_inputs is not None:
            raise CaptureError("both input_layer and teacher_inputs say what the teacher receives: leave one out")
        if calls is None and views > 1:
            raise CaptureError(
                f"the student layer ran {views} times in one step, but the teacher is fed the batch once: name the "
                "layer whose inputs it shall get, input_layer=..., or run what shall not count under no_grad or "
                "distiller.paused()"
            )
        if self.inputs is not None and not calls:
            raise CaptureError(f"the input_layer {self.inputs.layer!r} was never called in this step")
        if calls is None and parts > 1 and not self.teacher.needs_indices:
            given = features.batch
            calls = split_rows(given.inputs if given.teacher_inputs is None else given.teacher_inputs, parts)
        features.teachers = self.teacher.outputs(features.batch, calls)
        rows = len(first_tensor(student))
        for teacher in features.teachers:
            if (count := len(first_tensor(teacher.features))) != rows:
                raise CaptureError(
                    f"the student layer gives {rows} rows in {views} call(s), the {teacher.title} {count}; if the "
                    "student's inputs are not those of the batch, name the layer that receives them: input_layer=..."
                )
        if self._row_check.steps_left and torch.is_grad_enabled():
            self._row_check.check(features.batch.inputs if parts == 1 else split_rows(features.batch.inputs, parts)[0])
        return features

    def layers_ran(self) -> bool:
        """True if the student layer ran in this step, on all ranks alike. Collective: every rank must call it."""
        ran = self.student.ran
        if self._ranks > 1:
            every = gather_row_counts(int(ran), self._device, self.group)
            if len(set(every)) > 1:
                raise CaptureError(
                    f"the student layer ran on the ranks {[n for n, count in enumerate(every) if count]} only: a step "
                    "must use or leave out the layer on all ranks alike"
                )
        return ran

    def compute_terms(self, features: StepFeatures | Batch, *, epoch: int = 0, step: int = 0) -> dict[str, Tensor]:
        """Compute the weighted loss terms of a step by log name. Collective: every rank must call it.

        Args:
            features: Batch of this rank, for which features are collected, or features from :meth:`collect`.
            epoch: Current epoch, for weights and losses that depend on it.
            step: Number of the step, for messages.

        Raises:
            CaptureError: Student features without a gradient, or a batch without an input that a loss requires.
            NonFiniteError: NaN or infinity in the features of a network; on a GPU it is raised one step later.
        """
        if not isinstance(features, StepFeatures):
            features = self.collect(features)
        if not self.losses or not features.teachers:
            return {}
        if self._unsized:
            self._refuse_unsized(features)
        first = first_tensor(features.student)
        rows, device = len(first), first.device
        if self._adds_context:
            features.add_context(self.needs, self.student.rows, device)
            for bound in self.bound.values():
                bound.check_context(features.context)
        ranks = self._ranks if self.gather else 1
        counts, whole, shard = [rows], features, None
        if ranks > 1:
            counts = gather_row_counts(rows, device, self.group)
            whole, shard = features.gathered(self._gathered_needs, counts, self.group), Shard(self.group)
        terms = {}
        for name, bound in self.bound.items():
            # DDP averages over ranks, so a mean over local rows must be weighted by their number
            share = 1.0 if bound.loss.gather else ranks * rows / sum(counts)
            given = {"epoch": epoch, "shard": shard if bound.loss.gather else None}
            if isinstance(self.weight, int | float) and isinstance(bound.weight, int | float):
                weight = self.weight * bound.weight
            else:
                weight = self.weight_of(name, epoch)
            value = self._compute(bound, whole if bound.loss.gather else features, given, step, learns=weight != 0)
            terms[name] = value if weight * share == 1 else weight * share * value
        return terms

    def _compute(
        self, bound: BoundLoss, features: StepFeatures, given: dict[str, Any], step: int, *, learns: bool
    ) -> Tensor:
        """Compute the unweighted value of a term, averaged over teachers."""
        loss = bound.loss
        context: dict[str, Any] = {key: features.context[key] for key in bound.needs}
        context |= {key: given[key] for key in given if key in loss.needs}
        values = []
        for teacher in features.teachers:
            s, t = bound.select_inputs(features.student, teacher.features)
            if learns and torch.is_grad_enabled() and not (isinstance(s, Tensor) and s.requires_grad):
                self._refuse_missing_gradient(bound, s)
            among = f" ({teacher.title})" if teacher.name else ""
            try:
                value = loss(s, t, **context)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step}{among}: {error}") from None
            if value.device.type != "cpu":
                self._checks.check_features(bound, (s, t), value, bound.name + among, step)
            elif loss.reads == "embedding" and loss.gather and not self._checks.collapse_reported and _is_collapsed(s):
                self._checks.report_collapse(bound.name + among, step)
            values.append(value if teacher.weight == 1 else teacher.weight * value)
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def _check_teacher_accepts(self) -> None:
        if self.teacher is not None:
            for name, term in self.losses.items():
                self.teacher.check_loss(name, term.loss)

    def _refuse_missing_gradient(self, bound: BoundLoss, student: Any) -> None:
        tensors = bound.list_tensors(student)
        for x in tensors:
            if x.requires_grad:
                return
        if tensors:
            raise CaptureError(
                f"{bound.name}: the student layer gives a tensor without gradient: it is frozen (give the loss a "
                "weight of 0 until it is not, weight=lambda epoch: ...), ran under no_grad, lies inside reentrant "
                "activation checkpointing (use_reentrant=False works), or is a first layer whose input is read"
            )

    def _refuse_unsized(self, features: StepFeatures) -> None:
        for name in self._unsized:
            bound = self.bound[name]
            if not bound.loss.missing_sizes:
                continue
            inputs = bound.select_inputs(features.student, features.teachers[0].features)
            read = (select_fields(x, bound.loss.reads, who=name) for x in inputs)
            sizes = {**bound.loss.infer_sizes(*read), **self.known_sizes}
            raise ValueError(
                f"{name}: the loss has tensors of its own, which the optimizer must know before training begins: "
                f"pass {bound.loss.suggest_call(sizes)}"
            )


def _explain_missing(error: LayerNotFoundError, other: nn.Module | None, cure: str) -> LayerNotFoundError:
    """The error, with the cure if another network has the layer."""
    try:
        found = other is not None and find_layer(other, error.layer) is not None
    except LayerNotFoundError:
        found = False
    return LayerNotFoundError(f"{error}; {cure}", error.layer) if found else error


def _is_collapsed(embedding: Tensor) -> bool:
    rows = embedding.detach()
    return len(rows) > 1 and torch.equal(rows[1:], rows[:-1])


def combine_needs(losses: Sequence[BoundLoss]) -> Needs:
    """Combine the features and further inputs that the losses need."""
    student: dict[tuple[str, str], frozenset[int] | None] = {}
    teacher: dict[tuple[str, str], frozenset[int] | None] = {}
    for bound in losses:
        positions = bound.loss.feature_maps if bound.loss.reads == "feature_maps" else None
        own = None if positions is None else frozenset(positions)
        for found, taps in ((student, bound.student_taps), (teacher, bound.teacher_taps)):
            for field, tap in taps.items():
                earlier = found.get((tap, field), frozenset())
                found[tap, field] = None if own is None or earlier is None else own | earlier
    return Needs(student, teacher, frozenset().union(*(bound.needs for bound in losses)))
