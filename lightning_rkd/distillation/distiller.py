"""The engine: what the student and the teacher showed in one step becomes named, weighted loss terms.

Module, callback and schemes all call it, so a loss means the same in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import CaptureError, FeatureReader, InputReader, Layer
from lightning_rkd.distillation.finite_checks import FiniteChecks
from lightning_rkd.distillation.gathered import Gathered
from lightning_rkd.distillation.step import Shown, first_in, rows_in
from lightning_rkd.distillation.teachers.base import BaseTeacher
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.functional._kernels import load
from lightning_rkd.losses.base import (
    NonFiniteError,
    RelationalLoss,
    Weight,
    at_tap,
    named_terms,
    pick,
    weight_at,
)
from lightning_rkd.losses.lazy import Size
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.utils.distributed import Group, Shard, rank_and_size, row_counts, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs


class Distiller:
    """Taps, teacher, gathering and loss of one distillation.

    One step is ``begin()``, then the student runs, then ``terms(shown(batch))``. ``attach`` and ``detach`` bracket a
    fit.

    Args:
        teacher: A network, or whoever teaches; ``None`` only where there is no loss.
        loss: A loss, a sum, or a dict of losses; ``None`` only reads the networks.
        student_layer: Where to read the student; ``None`` is its output.
        teacher_layer: Where to read the teacher; ``None`` is its output.
        input_layer: Student layer whose inputs the teacher is fed with, call by call; ``None`` feeds it the batch.
        weight: Weight of all terms, a number or a function of the epoch.
        gather: Whether relations span the rows of all ranks.
    """

    def __init__(
        self,
        teacher: BaseTeacher | nn.Module | None,
        loss: RelationalLoss | Mapping[str, RelationalLoss] | None,
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
        self.losses = {} if loss is None else named_terms(loss)
        self.teacher_layer, self.weight, self.gather = teacher_layer, weight, gather
        self.student = FeatureReader(student_layer, "student")
        self.inputs = None if input_layer is None else InputReader(input_layer)
        taps = {*self.student.taps, *(() if self.teacher is None else self.teacher.taps(teacher_layer))} - {""}
        for name, term in self.losses.items():
            if term.tap is not None and term.tap not in taps:
                raise ValueError(
                    f"the loss {name} is read at the tap {term.tap!r}, which no layer is named: the taps are "
                    f"{sorted(taps) or 'none'}; name it, student_layer={{{term.tap!r}: ...}}"
                )
        self._check_losses()
        self.needs: frozenset[str] = frozenset().union(*(term.needs for term in self.losses.values()))
        self.group: Group = None
        self.known_sizes: Mapping[str, Size] | None = None  # set where losses must have their tensors before a step
        self._teaching = False
        self._watch = FiniteChecks()

    def attach(self, student: nn.Module, *, teach: bool = True) -> None:
        """Hook the student and, to ``teach``, the teacher, whose weights file is read now if it has one."""
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
        self._teaching = teach

    @property
    def needs_indices(self) -> bool:
        """Whether a loss or the teacher asks which rows of the root data set a batch holds."""
        return "indices" in self.needs or self.teacher_needs_indices

    @property
    def teacher_needs_indices(self) -> bool:
        """Whether the teacher does."""
        return self.teacher is not None and self.teacher.needs_indices

    def meet(self, loaders: Any, unpack: Callable[[Any], Batch], *, train: bool = True) -> None:
        """Show the teacher the loaders of a run; every rank calls this after :meth:`prepare`.

        Raises:
            ValueError: It cannot teach these data.
        """
        if self._teaching and self.teacher is not None:
            self.teacher.meet(loaders, unpack, self.group, train=train)

    @property
    def missing_sizes(self) -> frozenset[str]:
        """The sizes that losses do not know yet."""
        return frozenset().union(*(term.missing_sizes for term in self.losses.values()))

    def materialize(self, shown: Shown | None = None, num_samples: int | None = None) -> None:
        """Let every loss read its files and make its tensors, before optimizers and DDP exist.

        Args:
            shown: What the networks show for any batch; not needed where the losses know their sizes.
            num_samples: Size of the training set.

        Raises:
            ValueError: A loss lacks a size; the message states those that are known.
        """
        student = None if shown is None else shown.student
        teacher = None if shown is None or not shown.lessons else shown.lessons[0].shown

        def materialize() -> None:
            for term in self.losses.values():
                term.materialize(student, teacher, num_samples=num_samples)

        run_on_all_ranks(materialize)  # a machine may lack a file

    @property
    def banks(self) -> list[str]:
        """The losses that remember something from step to step."""
        return [n for n, t in self.losses.items() if any(isinstance(m, StepState) for m in t.modules())]

    @property
    def needs_rows(self) -> bool:
        """Whether a loss or the teacher asks for more of a batch than its inputs."""
        return self.teacher_needs_indices or bool(self.needs & {"labels", "indices", "view", "mix"})

    def weight_of(self, name: str, epoch: int) -> float:
        """The weight of a term in that epoch, the common one included."""
        return weight_at(self.weight, epoch) * self.losses[name].weight_at(epoch)

    def prepare(
        self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None, group: Group = None
    ) -> None:
        """Move the teacher to the student's device and precision, and check that all ranks hold the same one.

        Raises:
            ValueError: A memory on several ranks that does not see the rows of all; a loss that the teacher refuses.
            RuntimeError: Ranks hold different teachers.
        """
        self.group = group
        if self.banks and not self.gather and rank_and_size(group)[1] > 1:
            raise ValueError(
                f"gather=False, but the losses {self.banks} remember what they have seen, which must be the same on "
                "all ranks: leave gather=True"
            )
        self._check_losses()  # some have made their tensors only now
        load(device)
        if self._teaching and self.teacher is not None and self.teacher.to(device, convert):
            self.teacher.check_same_on_ranks(group)

    def detach(self) -> None:
        """Take all hooks off and hand the teacher back."""
        self.student.detach()
        if self.inputs is not None:
            self.inputs.detach()
        if self.teacher is not None:
            self.teacher.detach()
        self._teaching, self._watch = False, FiniteChecks()

    def begin(self) -> None:
        """Record what the student shows from now on."""
        self._watch.check()
        self.student.start()
        if self.inputs is not None:
            self.inputs.start()

    def begin_again(self) -> None:
        """In the middle of a step: what was shown so far counts only where nothing is shown from now on."""
        self.student.start_again()
        if self.inputs is not None:
            self.inputs.start_again()

    def look_at_losses(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Report parts of a step's loss that are not finite: at once on a CPU, a step later on a GPU.

        Raises:
            NonFiniteError: With their names.
        """
        self._watch.look_at_losses(losses, step)

    def finish(self) -> None:
        """Report what the last steps of a fit left to report; waits for the device.

        Raises:
            NonFiniteError: NaN or infinity in one of them.
        """
        self._watch.check(wait=True)

    def cancel(self) -> None:
        """Forget the step that has begun."""
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

    def shown(self, batch: Batch | None, *, teach: bool = True) -> Shown:
        """What the student showed since ``begin`` and, to ``teach``, what the teacher shows for the same inputs.

        Args:
            batch: The local rows. ``None`` where the step never saw a batch; then ``input_layer`` is needed.
            teach: Whether to call the teacher.

        Raises:
            CaptureError: The student layer was not called, or called several times without ``input_layer``, or the
                teacher shows another number of rows.
        """
        calls = None if self.inputs is None else self.inputs.collect()
        student, views = self.student.collect()
        teach = teach and self.teacher is not None
        if teach and calls is None and batch is None:
            raise CaptureError("the step was given no batch: name the layer that feeds the teacher, input_layer=...")
        if teach and calls is None and views > 1:
            raise CaptureError(
                f"the student layer ran {views} times in one step, but the teacher is fed the batch once: name the "
                "layer whose inputs it shall get, input_layer=..."
            )
        if teach and self.inputs is not None and not calls:
            raise CaptureError(f"the input_layer {self.inputs.layer!r} was never called in this step")
        shown = Shown(Batch(inputs=None) if batch is None else batch, student, views=views)
        if teach and self.teacher is not None:
            shown.lessons = self.teacher.lessons(shown.batch, calls)
            for lesson in shown.lessons:
                if rows_in(student) != rows_in(lesson.shown):
                    raise CaptureError(
                        f"the student layer shows {rows_in(student)} rows in {views} call(s), the {lesson.who} "
                        f"{rows_in(lesson.shown)}; where the student sees other inputs than the batch, name the layer "
                        "that gets them: input_layer=..."
                    )
        return shown

    def terms(self, shown: Shown, *, epoch: int = 0, step: int = 0) -> dict[str, Tensor]:
        """The weighted terms of the step under their log names; every rank must call this.

        Args:
            shown: What :meth:`shown` returned.
            epoch: For weights and losses that depend on it.
            step: For messages.

        Raises:
            CaptureError: The student showed something without a gradient.
            NonFiniteError: NaN or infinity on either side, with side and row; a step late on a GPU.
        """
        student = shown.student
        if not self.losses or not shown.lessons:
            return {}
        for name, term in self.losses.items():
            read = at_tap(student, term.tap, term.reads, who=name).tensors(term.reads)
            if torch.is_grad_enabled() and read and not any(t.requires_grad for t in read):
                raise CaptureError(
                    f"{name}: the student layer shows a tensor without gradient: it is frozen, ran under no_grad, "
                    "lies inside reentrant activation checkpointing (use_reentrant=False works), or is a first Linear, "
                    "of which the input is read (Tap(layer, at='output') reads the output)"
                )
        self._check_sizes(student, shown.lessons[0].shown)
        rows, device = rows_in(student), first_in(student).device
        ranks = rank_and_size(self.group)[1] if self.gather else 1
        counts = row_counts(rows, device, self.group) if ranks > 1 else [rows]
        local = {
            key: shown.repeated(key, value, device)
            for key, value in (("labels", shown.batch.labels), ("indices", shown.batch.indices))
            if key in self.needs
        }
        if shown.views > 1 and self.needs_rows:
            self._check_calls(local)
        local["view"] = shown.view_numbers(device)
        self._check_context(local, shown.batch)
        mix = shown.batch.mix
        gathered = Gathered(local, mix, counts, self.group) if ranks > 1 else None
        values = {}
        for name, term in self.losses.items():
            whole = gathered if term.gather else None
            context: dict[str, Any] = {k: whole.rows(k) if whole else local[k] for k in local if k in term.needs}
            context |= {"epoch": epoch, "shard": Shard(self.group) if whole else None}
            if "mix" in term.needs:
                context["mix"] = whole.mix() if whole else mix
            value = self._average(name, shown, whole, context, step)
            # a mean over own rows: DDP's mean over ranks must weigh ranks by their rows
            share = 1.0 if term.gather else ranks * rows / sum(counts)
            values[name] = self.weight_of(name, epoch) * share * value
        return values

    def _average(self, name: str, shown: Shown, whole: Gathered | None, context: dict[str, Any], step: int) -> Tensor:
        """The raw value of a term, averaged over the lessons."""
        term, values = self.losses[name], []
        for lesson in shown.lessons:
            s, t = (whole.side(x, term, name) if whole else x for x in (shown.student, lesson.shown))
            among = f" ({lesson.who})" if lesson.teacher else ""
            try:
                value = term.raw(s, t, **context)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step}{among}: {error}") from None
            self._watch.look(term, (s, t), name + among, step, value)
            values.append(value if lesson.share == 1 else lesson.share * value)
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def _check_losses(self) -> None:
        if self.teacher is not None:
            for name, term in self.losses.items():
                self.teacher.check_loss(name, term)

    def _check_sizes(self, student: dict[str, Outputs], teacher: dict[str, Outputs]) -> None:
        for name, term in self.losses.items():
            if self.known_sizes is not None and term.missing_sizes:
                sides = (at_tap(side, term.tap, term.reads, who=name) for side in (student, teacher))
                read = (pick(side, term.reads, who=name) for side in sides)
                sizes = {**term.loss.infer_sizes(*read), **self.known_sizes}
                raise ValueError(
                    f"{name}: the loss has tensors of its own, which the optimizer must know before training begins: "
                    f"pass {term.loss.suggest_call(sizes)}"
                )

    def _check_calls(self, local: Mapping[str, Tensor | None]) -> None:
        """Several calls of the student are views of the whole batch, or nobody knows which rows they show."""
        each = self.student.rows
        rows = {len(x) // len(each) for x in local.values() if x is not None} | set(each)
        if len(rows) > 1:
            raise CaptureError(
                f"the student layer ran on {', '.join(map(str, each))} rows in one step, which are no {len(each)} "
                "views of the batch, so that nobody can tell whose labels or indices they have: call the layer once, "
                "or on the whole batch each time"
            )

    def _check_context(self, local: Mapping[str, Tensor | None], batch: Batch) -> None:
        given = {name for name, value in {**local, "mix": batch.mix}.items() if value is not None}
        for name, term in self.losses.items():
            for absent in sorted(set(_CURES) & term.loss.required - given):
                raise CaptureError(f"{name}: {type(term.loss).__name__} needs {absent}, {_CURES[absent]}")


_CURES = {
    "labels": "but the batch has none: say where they are, labels=...",
    "indices": "the row of every sample in the training set: wrap the training loader, with_indices(loader), or name "
    "them in the batch, indices=...",
    "mix": "but the batch was not mixed: pass batch_transform=MixUp() to DistillationModule",
}
