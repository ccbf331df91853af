"""The contract every loss keeps, and the arithmetic of losses: ``25 * RKDDistance() + 50 * RKDAngle()``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_rkd.losses.context import checked_context
from lightning_rkd.losses.lazy import LazyModule, Size
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.sides import (
    FIELDS,
    NonFiniteError,
    Side,
    at_tap,
    cast,
    check_finite,
    check_value,
    pairs,
    pick,
)

__all__ = [
    "LossSum", "NonFiniteError", "Reference", "RelationalLoss", "Side", "Size", "Term", "Weight", "at_tap",
    "check_finite", "named_terms", "pick", "weight_at",
]  # fmt: skip

Weight = float | Callable[[int], float]
"""A number, or a function of the epoch."""

CONTEXT = frozenset({"labels", "indices", "view", "epoch", "mix", "shard"})
"""What a loss may ask for, as keyword-only parameters of its ``forward``."""

INVARIANCES = frozenset({"translation", "rotation", "scale", "row scale", "row shift"})
"""What may leave a loss unchanged, done to either side alone."""


def weight_at(weight: Weight, epoch: int) -> float:
    """The value of a weight in an epoch.

    Example:
        >>> weight_at(2, epoch=0), weight_at(lambda epoch: 0.5 * epoch, epoch=3)
        (2.0, 1.5)
    """
    return float(weight(epoch)) if callable(weight) else float(weight)


class RelationalLoss(LazyModule):
    r"""Base of all losses: compares what a student and a teacher show for the same N samples.

    A subclass writes ``forward(self, student, teacher)`` as plain maths and may ask for more through keyword-only
    parameters named ``labels`` ((N,) or soft (N, K)), ``indices`` (N,), ``view`` (N,), ``epoch`` (int), ``mix`` or
    ``shard``. Calling the loss takes care of the rest: both sides are checked, brought to float32 (float64 stays),
    the teacher is detached, and autocast is off.

    Class attributes:
        reads: The field of :class:`~lightning_rkd.utils.types.Outputs` that ``forward`` receives from both sides; or a
            tuple of fields, and ``forward`` receives the two ``Outputs``.
        gather: Whether the loss relates samples to one another. ``False`` marks a mean of per-sample terms,
            which the engine does not gather over ranks.
        invariances: What leaves the value unchanged, done to student or teacher alone: ``"translation"`` (the same
            vector added to all rows), ``"rotation"``, ``"scale"`` (all rows times a positive number), ``"row scale"``
            (each row times one of its own), ``"row shift"`` (a constant of its own added to each row).
        reference: The paper of the method, its provenance, and the published weight and result, for the gallery;
            optional. ``bibtex`` is the entry of the paper.

    A loss with tensors of its own (projectors, banks) makes them in a method ``build``, whose parameters name the sizes
    that it must know: ``student_dim``, ``teacher_dim`` (columns of the embedding or the logits; for maps a tuple of
    channels), ``num_classes``, ``num_samples`` (of the training set). Its ``__init__`` ends with :meth:`sized`, which
    builds at once what is known; the rest waits for the first call, or for ``DistillationModule``, which knows all
    sizes before optimizers are made. What is built stays in float32 (float64), whatever the precision of training.

    Raises:
        TypeError: Where a class asks for a name that does not exist, or a call passes one that was not asked for.
        ValueError: Sides that do not fit (rank, batch size, device, empty), hold NaN or infinity, or give a loss that
            overflows (the last two on a CPU; on other devices the engine finds them without stopping the step).

    Example:
        >>> class MeanGap(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).abs()
        >>> MeanGap()(torch.zeros(4, 2), torch.ones(4, 8))
        tensor(1.)
    """

    gather: bool = True
    invariances: frozenset[str] = frozenset()
    reference: ClassVar[Reference | None] = None
    bibtex: ClassVar[BibTeX] = BibTeX()
    needs: frozenset[str] = frozenset()
    required: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = {cls.reads} if isinstance(cls.reads, str) else set(cls.reads) if isinstance(cls.reads, tuple) else None
        if fields is not None and not fields <= FIELDS:
            raise TypeError(f"{cls.__name__}.reads must name fields of Outputs {sorted(FIELDS)}, got {cls.reads!r}")
        parameters = inspect.signature(cls.forward).parameters
        by_position = [*parameters][3:]  # behind self, student and teacher
        asked = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if misplaced := CONTEXT & set(by_position) - set(asked):
            raise TypeError(
                f"{cls.__name__}.forward takes {sorted(misplaced)} by position, but what a loss asks for stands behind "
                f"a star: forward(self, student, teacher, *, {', '.join(sorted(misplaced))})"
            )
        unknown = set(asked) - CONTEXT
        if unknown:
            raise TypeError(
                f"{cls.__name__}.forward asks for {sorted(unknown)}, but a loss may only ask for {sorted(CONTEXT)}"
            )
        if not set(cls.invariances) <= INVARIANCES:
            raise TypeError(f"{cls.__name__}.invariances must be among {sorted(INVARIANCES)}, got {cls.invariances}")
        cls.needs = frozenset(asked)
        cls.required = frozenset(n for n, p in asked.items() if p.default is inspect.Parameter.empty)

    forward: Callable[..., Tensor]

    def __call__(self, student: Side, teacher: Side, **context: Any) -> Tensor:
        """The loss as a scalar, after checking and casting both sides."""
        name = self.display_name
        unknown = set(context) - self.needs
        if unknown:
            raise TypeError(f"{name} does not use {sorted(unknown)}; it takes {sorted(self.needs) or 'no context'}")
        missing = {n for n in self.required if context.get(n) is None}
        if missing:
            raise ValueError(f"{name} needs {sorted(missing)}: pass {', '.join(f'{n}=...' for n in sorted(missing))}")
        s, t = pick(student, self.reads, who=f"{name}, student"), pick(teacher, self.reads, who=f"{name}, teacher")
        tensors = pairs(s, t, self.reads, name)
        rows, device = len(tensors[0][1]), tensors[0][1].device
        context = checked_context(context, rows, tensors[0][0], device, name)
        # float32 at least; two different precisions meet at the higher one, unless the loss has tensors of its own
        dtype = torch.float32
        for _, a, b in tensors:
            dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        if not self.ready:
            self.materialize(s, t, like=torch.empty(0, dtype=dtype, device=device))
        self.check_sizes(s, t)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), dtype)
        with torch.autocast(device_type=device.type, enabled=False):
            value: Tensor = super().__call__(cast(s, dtype), cast(t, dtype, detach=True), **context)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_value(value, tensors, self)
        return value

    def extra_repr(self) -> str:
        """Settings for ``print``: the arguments of ``__init__`` that are kept under their own names."""
        classes = (cls for cls in type(self).__mro__ if issubclass(cls, RelationalLoss))
        names = dict.fromkeys(name for cls in classes for name in inspect.signature(cls).parameters)
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in names if name in vars(self))

    def at(self, tap: str) -> Term:
        """This loss, read at the tap of that name: ``RKD().at("layer3")``."""
        return Term(self, tap=tap)

    def __mul__(self, weight: Weight) -> Term:
        return Term(self, weight)

    __rmul__ = __mul__

    def __add__(self, other: RelationalLoss) -> LossSum:
        return LossSum([*_as_terms(self), *_as_terms(other)])

    def __radd__(self, other: Literal[0]) -> RelationalLoss:  # sum([...]) starts at 0
        return self if isinstance(other, int) and other == 0 else NotImplemented


class Term(RelationalLoss):
    """A loss with a weight and, where a network is read in several places, the tap it reads.

    Args:
        loss: What is weighted.
        weight: A number or a function of the epoch.
        tap: Name of a tap; ``None`` reads the only tap, or the tap named like the field the loss reads.

    Example:
        >>> class Zero(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return student.sum() * 0 + 1
        >>> (25 * Zero())(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(25.)
    """

    def __init__(self, loss: RelationalLoss, weight: Weight = 1.0, tap: str | None = None) -> None:
        super().__init__()
        if not isinstance(loss, RelationalLoss) or isinstance(loss, LossSum):
            raise TypeError(f"a Term weighs one RelationalLoss, got {type(loss).__name__}")
        if not (callable(weight) or isinstance(weight, int | float)):
            raise TypeError(f"a weight is a number or a function of the epoch, got {type(weight).__name__}")
        if isinstance(loss, Term):
            weight, tap = _product(loss.weight, weight), tap if tap is not None else loss.tap
            loss = loss.loss
        self.loss: RelationalLoss = loss
        self.weight: Weight = weight
        self.tap: str | None = tap
        self.reads, self.gather, self.needs = loss.reads, loss.gather, loss.needs
        self.ready = True

    def weight_at(self, epoch: int = 0) -> float:
        """The weight in that epoch."""
        return weight_at(self.weight, epoch)

    def __call__(self, student: Side, teacher: Side, *, epoch: int = 0, **context: Any) -> Tensor:
        """The weighted loss."""
        return self.weight_at(epoch) * self.raw(student, teacher, epoch=epoch, **context)

    def raw(self, student: Side, teacher: Side, **context: Any) -> Tensor:
        """The loss before weighting, given only the part of the context it asked for."""
        who = type(self.loss).__name__
        return self.loss(
            at_tap(student, self.tap, self.reads, who=f"{who}, student"),
            at_tap(teacher, self.tap, self.reads, who=f"{who}, teacher"),
            **{k: v for k, v in context.items() if k in self.needs},
        )

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The sizes that the loss must still be told."""
        return self.loss.missing_sizes

    def materialize(
        self, student: Any = None, teacher: Any = None, *, num_samples: int | None = None, like: Tensor | None = None
    ) -> None:
        """Make the loss ready for what it will read at its tap."""
        who = type(self.loss).__name__
        sides = (
            None if side is None else pick(at_tap(side, self.tap, self.reads, who=who), self.reads, who=who)
            for side in (student, teacher)
        )
        self.loss.materialize(*sides, num_samples=num_samples, like=like)

    def extra_repr(self) -> str:
        """Weight and tap, for ``print``."""
        return f"weight={self.weight}" + (f", tap={self.tap!r}" if self.tap is not None else "")


class LossSum(RelationalLoss):
    """A weighted sum of losses; its keys are the names under which the terms are logged.

    Args:
        terms: A mapping from log name to loss, or a list of losses, named after their classes (``RKDDistance`` is
            logged as ``rkd_distance``).

    Example:
        >>> class Gap(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).abs()
        >>> total = 2 * Gap() + 3 * Gap()
        >>> list(total.terms), total(torch.zeros(2, 3), torch.ones(2, 3))
        (['gap', 'gap_2'], tensor(5.))
    """

    def __init__(self, terms: Mapping[str, RelationalLoss] | Sequence[RelationalLoss]) -> None:
        super().__init__()
        if isinstance(terms, Mapping):
            named = {name: loss if isinstance(loss, Term) else Term(loss) for name, loss in terms.items()}
        else:
            named = _named([loss if isinstance(loss, Term) else Term(loss) for loss in terms])
        if not named:
            raise ValueError("a sum of losses needs at least one loss")
        try:
            self.terms = nn.ModuleDict(named)
        except KeyError as error:  # a dot, or the name of a method of every module
            raise ValueError(f"a loss cannot have that name, {error.args[0]}; choose another") from None
        self.needs = frozenset().union(*(term.needs for term in named.values()))

    def __call__(self, student: Side, teacher: Side, **context: Any) -> Tensor:
        """The sum of the weighted losses; each receives the part of the context it asked for."""
        unknown = set(context) - self.needs - {"epoch"}
        if unknown:
            raise TypeError(f"no loss of this sum uses {sorted(unknown)}; together they take {sorted(self.needs)}")
        parts = [term(student, teacher, **context) for term in self.terms.values()]
        return torch.stack(parts).sum()

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The sizes that losses of the sum must still be told."""
        return tuple(sorted({size for term in named_terms(self).values() for size in term.missing_sizes}))

    def materialize(
        self, student: Any = None, teacher: Any = None, *, num_samples: int | None = None, like: Tensor | None = None
    ) -> None:
        """Make every loss ready for what it will read."""
        for term in named_terms(self).values():
            term.materialize(student, teacher, num_samples=num_samples, like=like)

    def __mul__(self, weight: Weight) -> LossSum:  # type: ignore[override] # a weighted sum stays a sum
        return LossSum({name: Term(term, weight) for name, term in named_terms(self).items()})

    __rmul__ = __mul__  # type: ignore[assignment] # as above

    def at(self, tap: str) -> LossSum:  # type: ignore[override] # as above
        """Every loss of the sum, read at the tap of that name."""
        return LossSum({name: Term(term, tap=tap) for name, term in named_terms(self).items()})


def named_terms(loss: RelationalLoss | Mapping[str, RelationalLoss]) -> dict[str, Term]:
    """Any loss, sum or dict of losses as terms under their log names.

    Example:
        >>> class Gap(RelationalLoss):
        ...     def forward(self, student, teacher): ...
        >>> {name: term.weight for name, term in named_terms(25 * Gap()).items()}
        {'gap': 25}
    """
    if isinstance(loss, Mapping):
        loss = LossSum(loss)
    if isinstance(loss, LossSum):
        return dict(loss.terms.items())  # type: ignore[arg-type]
    if isinstance(loss, RelationalLoss):
        return _named(_as_terms(loss))
    raise TypeError(f"loss must be a RelationalLoss or a dict of them, got {type(loss).__name__}")


def _as_terms(loss: RelationalLoss) -> list[Term]:
    if isinstance(loss, LossSum):
        return list(named_terms(loss).values())
    return [loss if isinstance(loss, Term) else Term(loss)]


def _named(terms: Sequence[Term]) -> dict[str, Term]:
    named: dict[str, Term] = {}
    for term in terms:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(term.loss).__name__).lower()
        if term.tap is not None:
            name += "_" + term.tap.replace(".", "_")
        count = 1 + sum(1 for taken in named if re.fullmatch(rf"{re.escape(name)}(_\d+)?", taken))
        named[name if count == 1 else f"{name}_{count}"] = term
    return named


@dataclass(frozen=True)
class _Product:
    """Product of two weights of which one depends on the epoch; a class, so that it pickles."""

    a: Weight
    b: Weight

    def __call__(self, epoch: int) -> float:
        return weight_at(self.a, epoch) * weight_at(self.b, epoch)


def _product(a: Weight, b: Weight) -> Weight:
    return _Product(a, b) if callable(a) or callable(b) else float(a) * float(b)
