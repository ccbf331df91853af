"""The engine: what the student and the teacher showed in one step becomes named, weighted loss terms.

Module, callback and schemes all call it, so a loss means the same in each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distributed import Anchors, Group, gather_rows, rank_and_size, row_counts
from lightning_rkd.losses.base import (
    NonFiniteError,
    RelationalLoss,
    Term,
    Weight,
    at_tap,
    named_terms,
    weight_at,
)
from lightning_rkd.records import Batch, Outputs
from lightning_rkd.taps import CaptureError, InputReader, Layer, Reader
from lightning_rkd.teachers import Teacher


class CollapseWarning(UserWarning):
    """All rows of the student's embedding are equal: relational losses have no gradient there."""


@dataclass(slots=True)
class Shown:
    """What one step showed: per tap, the rows of all ``views`` (student calls) one after the other."""

    batch: Batch
    student: dict[str, Outputs]
    teacher: dict[str, Outputs] | None = None
    views: int = 1

    @property
    def embedding(self) -> Outputs:
        """The student's outputs that a loss without a named tap reads an embedding from."""
        return at_tap(self.student, None, "embedding", who="student")  # type: ignore[no-any-return]

    @property
    def teacher_embedding(self) -> Outputs | None:
        """The same for the teacher."""
        if self.teacher is None:
            return None
        return at_tap(self.teacher, None, "embedding", who="teacher")  # type: ignore[no-any-return]


class Distiller:
    """Taps, teacher, gathering and loss of one distillation.

    One step is ``begin()``, then the student runs, then ``terms(shown(batch))``. ``attach`` and ``detach`` bracket a
    fit.

    Args:
        teacher: The teacher; ``None`` only where there is no loss.
        loss: A loss, a sum, or a dict of losses; ``None`` only reads the networks.
        student_layer: Where to read the student; ``None`` is its output.
        teacher_layer: Where to read the teacher; ``None`` is its output.
        input_layer: Student layer whose inputs the teacher is fed with, call by call; ``None`` feeds it the batch.
        weight: Weight of all terms, a number or a function of the epoch.
        gather: Whether relations span the rows of all ranks.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module | None,
        loss: RelationalLoss | Mapping[str, RelationalLoss] | None,
        *,
        student_layer: Layer | None = None,
        teacher_layer: Layer | None = None,
        input_layer: str | Callable[[nn.Module], nn.Module] | None = None,
        weight: Weight = 1.0,
        gather: bool = True,
    ) -> None:
        # a copy: each distillation keeps its own taps of a network that may teach several
        self.teacher = None if teacher is None else copy(teacher) if isinstance(teacher, Teacher) else Teacher(teacher)
        self.losses = {} if loss is None else named_terms(loss)
        self.teacher_layer, self.weight, self.gather = teacher_layer, weight, gather
        self.student = Reader(student_layer, "student")
        self.inputs = None if input_layer is None else InputReader(input_layer)
        taps = {*self.student.taps, *(teacher_layer if isinstance(teacher_layer, Mapping) else ())} - {""}
        for name, term in self.losses.items():
            if term.tap is not None and term.tap not in taps:
                raise ValueError(
                    f"the loss {name} is read at the tap {term.tap!r}, which no layer is named: the taps are "
                    f"{sorted(taps) or 'none'}; name it, student_layer={{{term.tap!r}: ...}}"
                )
        self.group: Group = None
        self._teaching = False
        self._watch = Watch()

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

    def prepare(
        self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None, group: Group = None
    ) -> None:
        """Move the teacher to the student's device and precision, and check that all ranks hold the same one."""
        self.group = group
        if self._teaching and self.teacher is not None and self.teacher.to(device, convert):
            self.teacher.check_same_on_ranks(group)

    def detach(self) -> None:
        """Take all hooks off and hand the teacher back."""
        self.student.detach()
        if self.inputs is not None:
            self.inputs.detach()
        if self.teacher is not None:
            self.teacher.detach()
        self._teaching, self._watch = False, Watch()

    def begin(self) -> None:
        """Record what the student shows from now on."""
        self._watch.check()
        self.student.start()
        if self.inputs is not None:
            self.inputs.start()

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
        calls = None if self.inputs is None else self.inputs.take()
        student, views = self.student.take()
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
        shown = Shown(Batch(inputs=None) if batch is None else batch, student, None, views)
        if teach and self.teacher is not None:
            shown.teacher = self.teacher(shown.batch, calls)
            if _rows(student) != _rows(shown.teacher):
                raise CaptureError(
                    f"the student layer shows {_rows(student)} rows in {views} call(s), the teacher "
                    f"{_rows(shown.teacher)}; where the student sees other inputs than the batch, name the layer that "
                    "gets them: input_layer=..."
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
        student, teacher = shown.student, shown.teacher
        if not self.losses or teacher is None:
            return {}
        for name, term in self.losses.items():
            read = _reads(at_tap(student, term.tap, term.reads, who=name), term)
            if read and not any(t.requires_grad for t in read):
                raise CaptureError(
                    f"{name}: the student layer shows a tensor without gradient: it is frozen, ran under no_grad, "
                    "lies inside reentrant activation checkpointing (use_reentrant=False works), or is a first Linear, "
                    "of which the input is read (Tap(layer, at='output') reads the output)"
                )
        rows, device = _rows(student), _first(student).device
        ranks = rank_and_size(self.group)[1] if self.gather else 1
        counts = row_counts(rows, device, self.group) if ranks > 1 else [rows]
        needed = frozenset().union(*(term.needs for term in self.losses.values()))
        local = {
            key: _repeat(value, shown.views, device)
            for key, value in (("labels", shown.batch.labels), ("indices", shown.batch.indices))
            if key in needed
        }
        local["view"] = torch.arange(shown.views, device=device).repeat_interleave(rows // shown.views)
        gathered = _Gathered(student, teacher, local, counts, self.group) if ranks > 1 else None
        factor = weight_at(self.weight, epoch)
        values = {}
        for name, term in self.losses.items():
            whole = gathered if term.across_samples else None
            sides = whole.sides(term, name) if whole else (student, teacher)
            context: dict[str, Any] = {k: whole.rows(k) if whole else local[k] for k in local if k in term.needs}
            context |= {"epoch": epoch, "mix": shown.batch.mix, "anchors": Anchors(self.group) if whole else None}
            try:
                value = term.raw(*sides, **context)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step}: {error}") from None
            self._watch.look(term, sides, name, step)
            # a mean over own rows: DDP's mean over ranks must weigh ranks by their rows
            share = 1.0 if term.across_samples else ranks * rows / sum(counts)
            values[name] = factor * term.weight_at(epoch) * share * value
        return values


class _Gathered:
    """Rows of all ranks, gathered once per tap and field however many losses read them."""

    def __init__(
        self,
        student: dict[str, Outputs],
        teacher: dict[str, Outputs],
        local: dict[str, Tensor | None],
        counts: list[int],
        group: Group,
    ) -> None:
        self._given, self._local, self._counts, self._group = (student, teacher), local, counts, group
        self._whole: dict[tuple[int, int, str], Any] = {}

    def sides(self, term: Term, name: str) -> tuple[Outputs, Outputs]:
        fields = (term.reads,) if isinstance(term.reads, str) else term.reads
        student, teacher = (
            self._outputs(number, at_tap(given, term.tap, term.reads, who=name), fields)
            for number, given in enumerate(self._given)
        )
        return student, teacher

    def rows(self, key: str) -> Tensor | None:
        value = self._local[key]
        if value is not None and (0, 0, key) not in self._whole:
            self._whole[0, 0, key] = gather_rows(value, self._counts, self._group)
        return self._whole.get((0, 0, key))

    def _outputs(self, side: int, local: Outputs, fields: tuple[str, ...]) -> Outputs:
        whole = Outputs(classifier=local.classifier)
        for field in fields:
            value = getattr(local, field)
            if field != "classifier" and value is not None:
                key = (side + 1, id(value[0] if isinstance(value, list) else value), field)
                if key not in self._whole:
                    self._whole[key] = (
                        [self._gather(v) for v in value] if isinstance(value, list) else self._gather(value)
                    )
                setattr(whole, field, self._whole[key])
        return whole

    def _gather(self, x: Tensor) -> Tensor:
        return gather_rows(x if x.dtype == torch.float64 else x.float(), self._counts, self._group)


class Watch:
    """Finds NaN, infinity and collapse without stopping the step.

    On a CPU the loss itself has already refused non-finite values. On other devices a few flags travel to the host
    while the step goes on, and are looked at when the next one begins.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Any, str, int]] = []
        self._reported = False

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()  # copies start anew: events on a GPU cannot be copied

    def look(self, term: Term, sides: tuple[Any, Any], name: str, step: int) -> None:
        """Note the state of what a term has just read."""
        read = [[t.detach() for t in _reads(at_tap(s, term.tap, term.reads, who=name), term)] for s in sides]
        if not all(read):
            return
        student = read[0][0]
        bad = [_first_bad(tensors) for tensors in read]
        equal = torch.zeros((), device=student.device)
        if term.reads == "embedding" and len(student) > 1:
            equal = (student[1:] == student[:1]).all()
        flags = torch.stack([*bad, equal.to(bad[0].dtype)])
        event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((flags, event, name, step))
        if event is None:
            self.check()

    def check(self, *, wait: bool = False) -> None:
        """Report what has arrived, or, to ``wait``, all that is under way.

        Raises:
            NonFiniteError: With side, row and step.
        """
        waiting, self._waiting = self._waiting, []
        for flags, event, name, step in waiting:
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                self._waiting.append((flags, event, name, step))
                continue
            *bad, equal = flags.tolist()
            for side, row in zip(("student", "teacher"), bad, strict=True):
                if row >= 0:
                    raise NonFiniteError(
                        f"step {step}: {name}: the {side}'s output holds NaN or infinity, first in row {row}"
                    )
            if equal and not self._reported:
                self._reported = True
                warnings.warn(
                    f"step {step}: the student has collapsed: all rows of the embedding that {name} reads are equal, "
                    "where relational losses have no gradient. Lower the learning rate, or add a task loss",
                    CollapseWarning,
                    stacklevel=2,
                )


def _tensors(shown: Mapping[str, Outputs]) -> list[Tensor]:
    return [t for o in shown.values() for t in (o.embedding, o.logits, *(o.maps or [])) if t is not None]


def _reads(shown: Outputs, term: Term) -> list[Tensor]:
    """The tensors a term reads, without the classifier's weights."""
    fields = {term.reads} if isinstance(term.reads, str) else set(term.reads)
    return _tensors({"": Outputs(**{f: getattr(shown, f) for f in fields - {"classifier"}})})


def _first_bad(tensors: list[Tensor]) -> Tensor:
    """The number of the first row with NaN or infinity, or -1, as a tensor on the device."""
    bad = torch.stack([(~t.isfinite()).flatten(1).any(1) for t in tensors]).any(0)
    return torch.where(bad.any(), bad.int().argmax(), -1)


def _first(shown: Mapping[str, Outputs]) -> Tensor:
    tensors = _tensors(shown)
    if not tensors:
        raise CaptureError("the tapped layers show no tensor")
    return tensors[0]


def _rows(shown: Mapping[str, Outputs]) -> int:
    return len(_first(shown))


def _repeat(rows: Tensor | None, views: int, device: torch.device) -> Tensor | None:
    return None if rows is None else torch.cat([rows.to(device)] * views)
