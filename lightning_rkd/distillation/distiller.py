"""The distillation engine: features of student and teacher in one step become named, weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import CaptureError, FeatureReader, InputReader, Layer
from lightning_rkd.distillation.finite_checks import FiniteChecks
from lightning_rkd.distillation.step import Needs, StepFeatures
from lightning_rkd.distillation.teachers.base import BaseTeacher
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.functional._kernels import load
from lightning_rkd.losses.base import NonFiniteError, RelationalLoss
from lightning_rkd.losses.inputs import combine_fields, resolve_taps, select_fields
from lightning_rkd.losses.lazy import Size
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.losses.weighting import LossSum, Term, Weight, evaluate_weight, terms_of
from lightning_rkd.utils.distributed import Group, Shard, gather_row_counts, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs, count_rows, first_tensor

_CURES = {
    "labels": "but the batch has none: say where they are, labels=...",
    "indices": "the row of every sample in the training set: wrap the training loader, with_indices(loader), or name "
    "them in the batch, indices=...",
    "mix": "but the batch was not mixed: pass batch_transform=MixUp() to DistillationModule",
}


@dataclass(frozen=True, slots=True)
class BoundLoss:
    """A loss with everything that stays the same from step to step.

    Attributes:
        name: Name under which the loss is logged.
        loss: The loss.
        weight: Its weight.
        student_taps: The student's tap of every field that the loss reads.
        teacher_taps: The teacher's.
        needs: Context that the loss takes beside the features.
    """

    name: str
    loss: Any
    weight: Weight
    student_taps: Mapping[str, str]
    teacher_taps: Mapping[str, str]
    needs: frozenset[str]

    @classmethod
    def bind(cls, name: str, term: Term, student_taps: Collection[str], teacher_taps: Collection[str]) -> BoundLoss:
        """Resolve the taps that a term of a loss reads.

        Raises:
            ValueError: A tap that does not exist, or several to choose from.
        """
        loss, given = term.loss, (list(student_taps), list(teacher_taps))
        student, teacher = (resolve_taps(taps, term.tap, loss.reads, who=name) for taps in given)
        return cls(name, loss, term.weight, student, teacher, loss.needs - {"epoch", "shard"})

    def student_tensors(self, student: Mapping[str, Outputs]) -> list[Tensor]:
        """The student's tensors that the loss reads."""
        return combine_fields(student, self.student_taps).tensors(self.loss.reads)

    def select_inputs(self, student: Mapping[str, Outputs], teacher: Mapping[str, Outputs]) -> tuple[Any, Any]:
        """The inputs of the loss: one field of both networks, or ``Outputs`` where it reads several.

        A missing field is left to the loss, whose error says how to tap it.
        """
        reads = self.loss.reads
        if isinstance(reads, str):
            s, t = student[self.student_taps[reads]], teacher[self.teacher_taps[reads]]
            of_student, of_teacher = getattr(s, reads), getattr(t, reads)
            return (s if of_student is None else of_student), (t if of_teacher is None else of_teacher)
        return combine_fields(student, self.student_taps), combine_fields(teacher, self.teacher_taps)

    def check_context(self, context: Mapping[str, Any]) -> None:
        """Refuse a step that lacks what the loss requires.

        Raises:
            CaptureError: It does; the message says how to provide it.
        """
        for key in sorted(self.loss.required & set(_CURES)):
            if context[key] is None:
                raise CaptureError(f"{self.name}: {type(self.loss).__name__} needs {key}, {_CURES[key]}")


class Distiller:
    """Feature readers, teacher, gathering over ranks and losses of one distillation.

    ``DistillationModule``, ``RelationalDistillation`` and a training loop of your own use the same methods:
    :meth:`attach` and :meth:`prepare` before training, then in every step :meth:`start`, the student's forward pass,
    :meth:`collect` and :meth:`compute_terms`; :meth:`detach` at the end.

    Args:
        teacher: A network or a teacher; ``None`` only where there is no loss.
        loss: A loss, a sum, or a dict of losses; ``None`` only reads the networks.
        student_layer: Where to read the student; ``None`` is its output.
        teacher_layer: Where to read the teacher; ``None`` is its output.
        input_layer: Student layer whose inputs are fed to the teacher, call by call; ``None`` feeds it the batch.
        weight: Weight of all terms, a number or a function of the epoch.
        gather: Whether relations span the rows of all ranks.

    Attributes:
        losses: The registered losses by log name, each with its weight and tap.

    Raises:
        ValueError: A loss is read at a tap that does not exist, or cannot be computed from the teacher's features.

    Example:
        >>> from lightning_rkd.losses.rkd import RKD
        >>> student, x = nn.Linear(4, 2), torch.randn(8, 4)
        >>> distiller = Distiller(nn.Linear(4, 3), RKD())
        >>> distiller.attach(student)
        >>> distiller.prepare("cpu")
        >>> distiller.start()
        >>> output = student(x)
        >>> terms = distiller.compute_terms(distiller.collect(Batch(x)))
        >>> list(terms), terms["rkd"].requires_grad
        (['rkd'], True)
        >>> distiller.detach()
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
        # a copy: each distillation keeps its own taps of a network that may teach several
        self.teacher: BaseTeacher | None = copy(teacher)
        self.losses = {} if loss is None else terms_of(loss)
        self.teacher_layer, self.weight, self.gather = teacher_layer, weight, gather
        self.student = FeatureReader(student_layer, "student")
        self.inputs = None if input_layer is None else InputReader(input_layer)
        taps = {*self.student.taps, *(() if self.teacher is None else self.teacher.taps(teacher_layer))} - {""}
        for name, term in self.losses.items():
            if term.tap is not None and term.tap not in taps:
                raise ValueError(
                    f"the loss {name} is read at the tap {term.tap!r}, but the taps are {sorted(taps) or 'none'}; name "
                    f"it, student_layer={{{term.tap!r}: ...}}"
                )
        self._check_losses()
        self.needs: frozenset[str] = frozenset().union(*(term.loss.needs for term in self.losses.values()))
        self.group: Group = None
        self.known_sizes: Mapping[str, Size] | None = None  # set where losses must have their tensors before a step
        self.bound: dict[str, BoundLoss] = {}
        self._teaching, self._unsized, self._ranks = False, list(self.losses), 1
        self._checks = FiniteChecks()

    def attach(self, student: nn.Module, *, teach: bool = True) -> None:
        """Hook the student and, to ``teach``, the teacher, whose weights file is read now if it has one.

        Everything that stays the same from step to step is resolved here.

        Raises:
            LayerNotFoundError: A layer does not exist.
            ValueError: There is a loss but no teacher, the networks share parameters, or a loss finds no tap to read.
        """
        self.detach()
        if teach and self.teacher is None:
            raise ValueError("there is a loss but no teacher: pass teacher=..., or no loss")
        self.student.attach(student)
        if self.inputs is not None:
            self.inputs.attach(student)
        if teach and self.teacher is not None:
            if self.teacher.shares_parameters_with(student):
                raise ValueError("the teacher shares parameters with the student; teach with copy.deepcopy(network)")
            self.teacher.attach(self.teacher_layer)
            taps = self.student.taps, self.teacher.taps(self.teacher_layer)
            self.bound = {name: BoundLoss.bind(name, term, *taps) for name, term in self.losses.items()}
        related = [bound for bound in self.bound.values() if bound.loss.gather]
        self._gathered_needs = combine_needs(related)
        self._adds_context, self._teaching = self.needs_rows, teach
        self._ranks = rank_and_size(self.group)[1]

    def prepare(
        self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None, group: Group = None
    ) -> None:
        """Move the teacher to the student's device and precision, and check that all ranks hold the same one.

        Args:
            device: Device of the student.
            convert: Casts the teacher, as a precision plugin does.
            group: Process group over which batches are split.

        Raises:
            ValueError: A memory on several ranks that does not see the rows of all; a loss that the teacher refuses.
            RuntimeError: Ranks hold different teachers.
        """
        self.group, self._ranks = group, rank_and_size(group)[1]
        if self.stateful_losses and not self.gather and self._ranks > 1:
            raise ValueError(
                f"gather=False, but the losses {self.stateful_losses} remember earlier rows, which must be the same on "
                "all ranks: leave gather=True"
            )
        self._check_losses()  # some have made their tensors only now
        self._unsized = [name for name, term in self.losses.items() if term.loss.missing_sizes]
        load(device)
        if self._teaching and self.teacher is not None and self.teacher.to(device, convert):
            self.teacher.check_same_on_ranks(group)

    def prepare_data(self, loaders: Any, unpack: Callable[[Any], Batch], *, train: bool = True) -> None:
        """Let the teacher check or read the loaders of a run; every rank calls this after :meth:`prepare`.

        Raises:
            ValueError: The teacher does not belong to these data.
        """
        if self._teaching and self.teacher is not None:
            self.teacher.prepare_data(loaders, unpack, self.group, train=train)

    def materialize(self, features: StepFeatures | None = None, num_samples: int | None = None) -> None:
        """Let every loss read its files and make its tensors, before optimizers and DDP exist.

        Args:
            features: Features of any batch; not needed where the losses know their sizes.
            num_samples: Size of the training set.

        Raises:
            ValueError: A loss lacks a size; the message states those that are known.
        """

        def materialize() -> None:
            for name, term in self.losses.items():
                loss, inputs = term.loss, (None, None)
                if features is not None and features.teachers and name in self.bound:
                    inputs = self.bound[name].select_inputs(features.student, features.teachers[0].features)
                    inputs = tuple(select_fields(x, loss.reads, who=type(loss).__name__) for x in inputs)
                loss.materialize(*inputs, num_samples=num_samples)

        run_on_all_ranks(materialize)  # a machine may lack a file

    def detach(self) -> None:
        """Remove all hooks and restore the teacher."""
        self.student.detach()
        if self.inputs is not None:
            self.inputs.detach()
        if self.teacher is not None:
            self.teacher.detach()
        self._teaching, self.bound, self._checks = False, {}, FiniteChecks()

    @property
    def needs_indices(self) -> bool:
        """Whether a loss or the teacher needs to know which rows of the root data set a batch holds."""
        return "indices" in self.needs or self.teacher_needs_indices

    @property
    def teacher_needs_indices(self) -> bool:
        """Whether the teacher does."""
        return self.teacher is not None and self.teacher.needs_indices

    @property
    def needs_rows(self) -> bool:
        """Whether a loss or the teacher needs more of a batch than its inputs."""
        return self.teacher_needs_indices or bool(self.needs & {"labels", "indices", "view", "mix"})

    @property
    def missing_sizes(self) -> frozenset[str]:
        """The sizes that losses do not know yet."""
        return frozenset().union(*(term.loss.missing_sizes for term in self.losses.values()))

    @property
    def stateful_losses(self) -> list[str]:
        """Names of the losses that remember something from step to step."""
        return [n for n, t in self.losses.items() if any(isinstance(m, StepState) for m in t.loss.modules())]

    def weight_of(self, name: str, epoch: int) -> float:
        """The weight of a term in that epoch, the common one included."""
        return evaluate_weight(self.weight, epoch) * evaluate_weight(self.losses[name].weight, epoch)

    def start(self) -> None:
        """Begin a step: record the student's features from now on."""
        if self._checks.waiting:
            self._checks.report()
        self.student.start()
        if self.inputs is not None:
            self.inputs.start()

    def restart(self) -> None:
        """In the middle of a step: features so far count only where no layer runs from now on."""
        self.student.restart()
        if self.inputs is not None:
            self.inputs.restart()

    def discard(self) -> None:
        """End a step: forget what was recorded."""
        if self.student.on:
            self.student.stop()
        if self.inputs is not None:
            self.inputs.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside: a backward pass may run layers again (activation checkpointing)."""
        readers = [r for r in (self.student, self.inputs) if r is not None and r.on]
        for reader in readers:
            reader.on = False
        try:
            yield
        finally:
            for reader in readers:
                reader.on = True

    def finish(self) -> None:
        """Report what the checks of the last steps have found; waits for the device.

        Raises:
            NonFiniteError: NaN or infinity in one of them.
        """
        self._checks.report(wait=True)

    def check_losses(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Report parts of a step's loss that are not finite: at once on a CPU, a step later on other devices.

        Raises:
            NonFiniteError: With their names.
        """
        self._checks.check_losses(losses, step)

    def collect(self, batch: Batch | None, *, teach: bool = True) -> StepFeatures:
        """Features of the student since :meth:`start` and, to ``teach``, of the teacher for the same inputs.

        Args:
            batch: The local rows. ``None`` where the step never saw a batch; then ``input_layer`` is needed.
            teach: Whether to call the teacher.

        Raises:
            CaptureError: The student layer was not called, or called several times without ``input_layer``, or the
                teacher gives another number of rows.
        """
        calls = None if self.inputs is None else self.inputs.collect()
        student, views = self.student.collect()
        features = StepFeatures(Batch(inputs=None) if batch is None else batch, student, views=views)
        if not teach or self.teacher is None:
            return features
        if calls is None and batch is None:
            raise CaptureError("the step was given no batch: name the layer that feeds the teacher, input_layer=...")
        if calls is None and views > 1:
            raise CaptureError(
                f"the student layer ran {views} times in one step, but the teacher is fed the batch once: name the "
                "layer whose inputs it shall get, input_layer=..."
            )
        if self.inputs is not None and not calls:
            raise CaptureError(f"the input_layer {self.inputs.layer!r} was never called in this step")
        features.teachers = self.teacher.outputs(features.batch, calls)
        rows = count_rows(student)
        for teacher in features.teachers:
            if count_rows(teacher.features) != rows:
                raise CaptureError(
                    f"the student layer gives {rows} rows in {views} call(s), the {teacher.title} "
                    f"{count_rows(teacher.features)}; where the student sees other inputs than the batch, name the "
                    "layer that gets them: input_layer=..."
                )
        return features

    def compute_terms(self, features: StepFeatures, *, epoch: int = 0, step: int = 0) -> dict[str, Tensor]:
        """The weighted terms of the step by log name; every rank must call this.

        Args:
            features: What :meth:`collect` returned.
            epoch: For weights and losses that depend on it.
            step: For messages.

        Raises:
            CaptureError: Student features without a gradient, or a batch that lacks what a loss requires.
            NonFiniteError: NaN or infinity in the features of a network, with its row; a step late on a GPU.
        """
        if not self.losses or not features.teachers:
            return {}
        if self.known_sizes is not None and self._unsized:
            self._refuse_unsized(features)
        first = first_tensor(features.student)
        rows, device = len(first), first.device
        if self._adds_context:
            self._add_context(features, device)
        ranks = self._ranks if self.gather else 1
        counts, whole, shard = [rows], features, None
        if ranks > 1:
            counts = gather_row_counts(rows, device, self.group)
            whole, shard = features.gathered(self._gathered_needs, counts, self.group), Shard(self.group)
        terms = {}
        for name, bound in self.bound.items():
            # a mean over own rows: DDP's mean over ranks must weigh ranks by their rows
            share = 1.0 if bound.loss.gather else ranks * rows / sum(counts)
            given = {"epoch": epoch, "shard": shard if bound.loss.gather else None}
            value = self._compute(bound, whole if bound.loss.gather else features, given, step)
            if isinstance(self.weight, int | float) and isinstance(bound.weight, int | float):
                weight = self.weight * bound.weight
            else:
                weight = self.weight_of(name, epoch)
            terms[name] = weight * share * value
        return terms

    def _compute(self, bound: BoundLoss, features: StepFeatures, given: dict[str, Any], step: int) -> Tensor:
        """The unweighted value of a term, averaged over teachers."""
        loss = bound.loss
        context: dict[str, Any] = {key: features.context[key] for key in bound.needs}
        context |= {key: given[key] for key in given if key in loss.needs}
        values = []
        for teacher in features.teachers:
            s, t = bound.select_inputs(features.student, teacher.features)
            if torch.is_grad_enabled():
                self._check_gradient(bound, s)
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

    def _check_losses(self) -> None:
        if self.teacher is not None:
            for name, term in self.losses.items():
                self.teacher.check_loss(name, term.loss)

    def _check_gradient(self, bound: BoundLoss, student: Any) -> None:
        if isinstance(student, Outputs):
            tensors = student.tensors(bound.loss.reads)
        else:
            tensors = [student] if isinstance(student, Tensor) else [x for x in student if isinstance(x, Tensor)]
        for x in tensors:
            if x.requires_grad:
                return
        if tensors:
            raise CaptureError(
                f"{bound.name}: the student layer gives a tensor without gradient: it is frozen, ran under no_grad, "
                "lies inside reentrant activation checkpointing (use_reentrant=False works), or is a first Linear, "
                "of which the input is read (Tap(layer, at='output') reads the output)"
            )

    def _refuse_unsized(self, features: StepFeatures) -> None:
        for name in self._unsized:
            bound = self.bound[name]
            if not bound.loss.missing_sizes:
                continue
            inputs = bound.select_inputs(features.student, features.teachers[0].features)
            read = (select_fields(x, bound.loss.reads, who=name) for x in inputs)
            sizes = {**bound.loss.infer_sizes(*read), **(self.known_sizes or {})}
            raise ValueError(
                f"{name}: the loss has tensors of its own, which the optimizer must know before training begins: "
                f"pass {bound.loss.suggest_call(sizes)}"
            )

    def _add_context(self, features: StepFeatures, device: torch.device) -> None:
        """Labels, indices, views and mix of the rows, where a loss needs them."""
        batch, context = features.batch, features.context
        for key, rows in (("labels", batch.labels), ("indices", batch.indices)):
            if key in self.needs:
                context[key] = features.repeat_rows(key, rows, device)
        if features.views > 1:
            self._check_calls(context)
        if "view" in self.needs:
            context["view"] = features.number_views(device)
        if "mix" in self.needs:
            context["mix"] = batch.mix
        for bound in self.bound.values():
            bound.check_context(context)

    def _check_calls(self, context: Mapping[str, Any]) -> None:
        """Several calls of the student are views of the whole batch, or their labels and indices are unknown."""
        each = self.student.rows
        rows = {len(x) // len(each) for x in context.values() if x is not None} | set(each)
        if len(rows) > 1:
            raise CaptureError(
                f"the student layer ran on {', '.join(map(str, each))} rows in one step, which are no {len(each)} "
                "views of the batch, so that their labels and indices are unknown: call the layer once, or on the "
                "whole batch each time"
            )


def _is_collapsed(embedding: Tensor) -> bool:
    rows = embedding.detach()
    return len(rows) > 1 and bool((rows[1:] == rows[:1]).all())


def combine_needs(losses: Sequence[BoundLoss]) -> Needs:
    """Features and context that at least one of the losses needs."""
    student = dict.fromkeys((tap, field) for bound in losses for field, tap in bound.student_taps.items())
    teacher = dict.fromkeys((tap, field) for bound in losses for field, tap in bound.teacher_taps.items())
    return Needs(tuple(student), tuple(teacher), frozenset().union(*(bound.needs for bound in losses)))
