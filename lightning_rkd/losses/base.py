"""The contract every loss keeps, and the arithmetic of losses: ``25 * RKDDistance() + 50 * RKDAngle()``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_rkd.records import Outputs

Side = Tensor | Sequence[Tensor] | Outputs | Mapping[str, Outputs]
"""What a loss may be given for one network: the value it reads, or ``Outputs`` (per tap) to pick it from."""

Weight = float | Callable[[int], float]
"""A number, or a function of the epoch."""

CONTEXT = frozenset({"labels", "indices", "view", "epoch", "mix", "anchors"})
"""What a loss may ask for, as keyword-only parameters of its ``forward``."""

FIELDS = frozenset({"embedding", "logits", "maps", "classifier"})


def weight_at(weight: Weight, epoch: int) -> float:
    """The value of a weight in an epoch.

    Example:
        >>> weight_at(2, epoch=0), weight_at(lambda epoch: 0.5 * epoch, epoch=3)
        (2.0, 1.5)
    """
    return float(weight(epoch)) if callable(weight) else float(weight)


class RelationalLoss(nn.Module):
    r"""Base of all losses: compares what a student and a teacher show for the same N samples.

    A subclass writes ``forward(self, student, teacher)`` as plain maths and may ask for more through keyword-only
    parameters named ``labels`` ((N,) or soft (N, K)), ``indices`` (N,), ``view`` (N,), ``epoch`` (int), ``mix`` or
    ``anchors``. Calling the loss takes care of the rest: both sides are checked, brought to float32 (float64 stays),
    the teacher is detached, and autocast is off.

    Class attributes:
        reads: The field of :class:`~lightning_rkd.records.Outputs` that ``forward`` receives from both sides; or a
            tuple of fields, and ``forward`` receives the two ``Outputs``.
        across_samples: Whether the loss relates samples to one another. ``False`` marks a mean of per-sample terms,
            which the engine does not gather over ranks.

    Raises:
        TypeError: Where a class asks for a name that does not exist, or a call passes one that was not asked for.
        ValueError: Sides that do not fit (rank, batch size, empty), or hold NaN or infinity (CPU; on other devices
            the engine finds those without stopping the step).

    Example:
        >>> class MeanGap(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).abs()
        >>> MeanGap()(torch.zeros(4, 2), torch.ones(4, 8))
        tensor(1.)
    """

    reads: str | tuple[str, ...] = "embedding"
    across_samples: bool = True
    needs: frozenset[str] = frozenset()
    _required: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = {cls.reads} if isinstance(cls.reads, str) else set(cls.reads) if isinstance(cls.reads, tuple) else None
        if fields is not None and not fields <= FIELDS:
            raise TypeError(f"{cls.__name__}.reads must name fields of Outputs {sorted(FIELDS)}, got {cls.reads!r}")
        asked = {
            name: p
            for name, p in inspect.signature(cls.forward).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        unknown = set(asked) - CONTEXT
        if unknown:
            raise TypeError(
                f"{cls.__name__}.forward asks for {sorted(unknown)}, but a loss may only ask for {sorted(CONTEXT)}"
            )
        cls.needs = frozenset(asked)
        cls._required = frozenset(n for n, p in asked.items() if p.default is inspect.Parameter.empty)

    forward: Callable[..., Tensor]

    def __call__(self, student: Side, teacher: Side, **context: Any) -> Tensor:
        """The loss as a scalar, after checking and casting both sides."""
        name = type(self).__name__
        unknown = set(context) - self.needs
        if unknown:
            raise TypeError(f"{name} does not use {sorted(unknown)}; it takes {sorted(self.needs) or 'no context'}")
        missing = {n for n in self._required if context.get(n) is None}
        if missing:
            raise ValueError(f"{name} needs {sorted(missing)}: pass {', '.join(f'{n}=...' for n in sorted(missing))}")
        s, t = pick(student, self.reads, who=f"{name}, student"), pick(teacher, self.reads, who=f"{name}, teacher")
        tensors = _pairs(s, t, self.reads, name)
        rows = len(tensors[0][1])
        for key in ("labels", "indices", "view"):
            value = context.get(key)
            if value is not None and len(value) != rows:
                raise ValueError(f"{name}: {key} has {len(value)} rows, but the embeddings have {rows}")
        # float32 at least; two different precisions meet at the higher one
        dtype = torch.float32
        for _, a, b in tensors:
            dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        with torch.autocast(device_type=tensors[0][1].device.type, enabled=False):
            return super().__call__(_cast(s, dtype), _cast(t, dtype, detach=True), **context)  # type: ignore[no-any-return]

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
        self.reads, self.across_samples, self.needs = loss.reads, loss.across_samples, loss.needs

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
        self.terms = nn.ModuleDict(named)
        self.needs = frozenset().union(*(term.needs for term in named.values()))

    def __call__(self, student: Side, teacher: Side, **context: Any) -> Tensor:
        """The sum of the weighted losses; each receives the part of the context it asked for."""
        unknown = set(context) - self.needs - {"epoch"}
        if unknown:
            raise TypeError(f"no loss of this sum uses {sorted(unknown)}; together they take {sorted(self.needs)}")
        parts = [term(student, teacher, **context) for term in self.terms.values()]
        return torch.stack(parts).sum()

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


def at_tap(side: Side, tap: str | None, reads: str | tuple[str, ...], *, who: str) -> Any:
    """Pick from a mapping of taps: the named tap, else the only one, else the tap named like the field."""
    if not isinstance(side, Mapping):
        return side
    if tap is not None and set(side) != {""}:
        if tap not in side:
            raise ValueError(f"{who}: there is no tap {tap!r}; the taps are {sorted(side)}")
        return side[tap]
    if len(side) == 1:
        return next(iter(side.values()))
    fields = (reads,) if isinstance(reads, str) else reads
    if all(field in side for field in fields):
        return Outputs(**{field: getattr(side[field], field) for field in fields})
    raise ValueError(
        f"{who}: reads {reads!r}, but the network is tapped at {sorted(side)}; "
        f"say which one with loss.at({min(side)!r})"
    )


def pick(side: Any, reads: str | tuple[str, ...], *, who: str) -> Any:
    """The value a loss reads: the field of ``Outputs``, or the bare tensor it was given."""
    if isinstance(side, Mapping):
        side = at_tap(side, None, reads, who=who)
    fields = (reads,) if isinstance(reads, str) else reads
    if isinstance(side, Outputs):
        absent = [f for f in fields if getattr(side, f) is None]
        if absent:
            raise ValueError(f"{who}: the tapped layer shows no {' and no '.join(absent)}{_CURE.get(absent[0], '')}")
        return getattr(side, reads) if isinstance(reads, str) else side
    if not isinstance(reads, str):
        raise TypeError(f"{who}: this loss reads {reads}, so it takes Outputs, got {type(side).__name__}")
    return side


_CURE = {
    "classifier": ": tap the Linear layer that makes the logits",
    "maps": ": name a list of layers",
    "embedding": ": name one layer whose output is (N, D)",
}


def _pairs(student: Any, teacher: Any, reads: str | tuple[str, ...], name: str) -> list[tuple[str, Tensor, Tensor]]:
    """All (field, student tensor, teacher tensor) that a loss is about to compare, checked."""
    pairs: list[tuple[str, Tensor, Tensor]] = []
    if isinstance(student, Outputs):
        for field in ("embedding", "logits"):
            a, b = getattr(student, field), getattr(teacher, field)
            if a is not None and b is not None:
                pairs.append((field, a, b))
        if student.maps is not None and teacher.maps is not None:
            pairs += [(f"maps[{i}]", a, b) for i, (a, b) in enumerate(zip(student.maps, teacher.maps, strict=False))]
    elif isinstance(student, Tensor):
        pairs.append((str(reads), student, teacher))
    else:
        if len(student) != len(teacher):
            raise ValueError(f"{name}: the student shows {len(student)} maps, the teacher {len(teacher)}")
        pairs += [(f"maps[{i}]", a, b) for i, (a, b) in enumerate(zip(student, teacher, strict=True))]
    for field, a, b in pairs:
        for side, x in (("student", a), ("teacher", b)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: the {side}'s {field} must be a tensor, got {type(x).__name__}")
            if not x.is_floating_point():
                raise TypeError(f"{name}: the {side}'s {field} must be floating point, got {x.dtype}")
            if field == "embedding" and x.ndim != 2:
                raise ValueError(
                    f"{name}: the {side}'s embedding must be (N, D), got {tuple(x.shape)}; pool it with "
                    "Tap(layer, read=global_pool) or mean_pool, cls_token"
                )
            if field != "embedding" and x.ndim < 2:
                raise ValueError(f"{name}: the {side}'s {field} must begin with (N, ...), got {tuple(x.shape)}")
            if x.ndim == 0 or x.numel() == 0:
                raise ValueError(f"{name}: the {side}'s {field} is empty, shape {tuple(x.shape)}")
        if len(a) != len(b):
            raise ValueError(
                f"{name}: student and teacher must show the same N samples, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(a, b, name=name)
    if not pairs:
        raise ValueError(f"{name}: nothing to compare")
    return pairs


def check_finite(student: Tensor, teacher: Tensor, *, name: str = "the loss") -> None:
    """Raise :class:`NonFiniteError` naming side and row if either tensor holds NaN or infinity."""
    for side, x in (("student", student), ("teacher", teacher)):
        finite = torch.isfinite(x.detach())
        if not finite.all():
            row = int((~finite.flatten(1).all(1)).nonzero()[0])
            raise NonFiniteError(f"{name}: the {side}'s output holds NaN or infinity, first in row {row} of {len(x)}")


class NonFiniteError(ValueError):
    """An embedding, logit or map holds NaN or infinity."""


def _cast(value: Any, dtype: torch.dtype, detach: bool = False) -> Any:
    if isinstance(value, Tensor):
        return (value.detach() if detach else value).to(dtype)
    if isinstance(value, Outputs):
        return Outputs(
            **{f: _cast(v, dtype, detach) for f in FIELDS if (v := getattr(value, f)) is not None},
        )
    if value is None:
        return None
    return type(value)(_cast(v, dtype, detach) for v in value)


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
