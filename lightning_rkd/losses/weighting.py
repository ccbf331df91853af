"""Weights and sums of losses: ``25 * RKDDistance() + 50 * RKDAngle()``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn

from lightning_rkd.losses.inputs import select_tap

Weight = float | Callable[[int], float]
"""A number, or a function of the epoch."""


def evaluate_weight(weight: Weight, epoch: int) -> float:
    """Value of a weight in an epoch."""
    return float(weight(epoch)) if callable(weight) else float(weight)


@dataclass(frozen=True, slots=True)
class Term:
    """One loss of a sum; without a ``tap`` it reads the only tap, or the tap of the field's name."""

    loss: Any
    weight: Weight = 1.0
    tap: str | None = None


class Weighable(nn.Module):
    """A module that can be weighted, added and read at a named tap; each gives a :class:`LossSum`."""

    def at(self, tap: str) -> LossSum:
        """Read at a named tap: ``RKD().at("layer3")``."""
        return LossSum(self, tap=tap)

    def __mul__(self, weight: Weight) -> LossSum:
        return LossSum(self, weight)

    __rmul__ = __mul__

    def __add__(self, other: Weighable) -> LossSum:
        return LossSum([self, other])

    def __radd__(self, other: Literal[0]) -> Weighable:  # sum([...]) starts at 0
        return self if isinstance(other, int) and other == 0 else NotImplemented


class LossSum(Weighable):
    """Weighted sum of losses, each of which checks and casts its own inputs.

    Args:
        losses: A loss, a list of losses or sums, or a mapping from log names to losses or weighted losses. Without a
            mapping, losses are named after their classes: ``RKDDistance`` is logged as ``rkd_distance``.
        weight: Weight of all terms, a number or a function of the epoch.
        tap: Name of the tap that all losses read.

    Attributes:
        terms: Loss, weight and tap of every term, by name.

    Example:
        >>> from lightning_rkd.losses.base import RelationalLoss
        >>> class Gap(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).abs()
        >>> total = 2 * Gap() + 3 * Gap()
        >>> list(total.terms), total(torch.zeros(2, 3), torch.ones(2, 3))
        (['gap', 'gap_2'], tensor(5.))
    """

    def __init__(
        self,
        losses: Union[Weighable, Mapping[str, Weighable], Sequence[Weighable]],  # noqa: UP007 - as jsonargparse reads it
        weight: Weight = 1.0,
        tap: str | None = None,
    ) -> None:
        super().__init__()
        if not (callable(weight) or isinstance(weight, int | float)):
            raise TypeError(f"a weight is a number or a function of the epoch, got {type(weight).__name__}")
        if isinstance(losses, Mapping):
            named = {name: _single_term(name, loss) for name, loss in losses.items()}
        elif isinstance(losses, Sequence):
            named = _name_terms([term for loss in losses for term in terms_of(loss).values()])
        else:
            named = terms_of(losses)
        if not named:
            raise ValueError("a sum of losses needs at least one loss")
        self.terms = {
            name: Term(term.loss, multiply_weights(term.weight, weight), term.tap if tap is None else tap)
            for name, term in named.items()
        }
        if tap is not None and not isinstance(losses, LossSum | Mapping):
            self.terms = _name_terms(list(self.terms.values()))
        try:
            self.losses = nn.ModuleDict({name: term.loss for name, term in self.terms.items()})
        except KeyError as error:  # a dot, or the name of a method of every module
            raise ValueError(f"a loss cannot have that name, {error.args[0]}; choose another") from None

    @property
    def aligns(self) -> bool:
        return any(term.loss.aligns for term in self.terms.values())

    def forward(self, student: Any, teacher: Any, *, epoch: int = 0, **context: Any) -> Tensor:
        """Compute the weighted sum; each loss receives those further inputs that it takes."""
        known = frozenset().union(*(term.loss.needs for term in self.terms.values()))
        if unknown := context.keys() - known:
            raise TypeError(f"no loss of this sum uses {sorted(unknown)}; together they take {sorted(known)}")
        context["epoch"] = epoch
        values = []
        for name, term in self.terms.items():
            given = {key: value for key, value in context.items() if key in term.loss.needs}
            pair = (select_tap(x, term.tap, term.loss.reads, who=name) for x in (student, teacher))
            values.append(evaluate_weight(term.weight, epoch) * term.loss(*pair, **given))
        return torch.stack(values).sum()

    def extra_repr(self) -> str:
        """Weights and taps, for ``print``."""
        return ", ".join(
            f"{name}: weight={term.weight}" + (f", tap={term.tap!r}" if term.tap is not None else "")
            for name, term in self.terms.items()
        )


def terms_of(loss: Weighable | Mapping[str, Weighable]) -> dict[str, Term]:
    """Terms of a loss, a sum or a dict of losses, by log name."""
    if isinstance(loss, Mapping):
        return LossSum(loss).terms
    if isinstance(loss, LossSum):
        return loss.terms
    if isinstance(loss, Weighable):
        return _name_terms([Term(loss)])
    raise TypeError(f"loss must be a RelationalLoss, an instance such as RKD(), or a dict of them, got {loss!r:.80}")


def multiply_weights(a: Weight, b: Weight) -> Weight:
    """Multiply two weights, each a number or a function of the epoch."""
    return _Product(a, b) if callable(a) or callable(b) else float(a) * float(b)


@dataclass(frozen=True)
class _Product:  # a class, so that it pickles
    a: Weight
    b: Weight

    def __call__(self, epoch: int) -> float:
        return evaluate_weight(self.a, epoch) * evaluate_weight(self.b, epoch)


def _single_term(name: str, loss: Any) -> Term:
    terms = list(terms_of(loss).values()) if isinstance(loss, Weighable) else []
    if len(terms) != 1:
        raise TypeError(f"the loss named {name!r} must be one RelationalLoss, weighted or not, got {loss!r}")
    return terms[0]


def _name_terms(terms: Sequence[Term]) -> dict[str, Term]:
    """Name terms after their classes in snake case, followed by the tap and, for repeated names, a number."""
    named: dict[str, Term] = {}
    for term in terms:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(term.loss).__name__).lower()
        if term.tap is not None:
            name += "_" + term.tap.replace(".", "_")
        count = 1 + sum(1 for taken in named if re.fullmatch(rf"{re.escape(name)}(_\d+)?", taken))
        named[name if count == 1 else f"{name}_{count}"] = term
    return named
