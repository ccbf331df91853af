"""Gradients of loss terms relative to the task loss's: weights that match them, and a comparison after the start."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_rkd.distillation.distiller import BoundLoss, Distiller
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.utils.distributed import Group, rank_and_size, sum_over_ranks

Compare = Literal["once", "epoch", "step"]
"""When gradients are compared: once, once an epoch, or in every step that is logged."""

Scale = Callable[[Tensor], Tensor]

_log = logging.getLogger(__name__)
_FIRST_STEP = 10  # earlier gradients are those of the initialisation
_MOST, _LEAST = 5.0, 1 / 50
_DEPTH = 16


class WeightWarning(UserWarning):
    """The gradient of a loss term is far larger or far smaller than that of the task loss."""


class GradientBalance:
    """Weights and compares loss terms by the norms of their gradients at the features that they read.

    With ``balance`` each term's gradient has that norm in units of the task loss's. ``compare`` says when norms are
    compared, and a :class:`WeightWarning` says which weight would make them equal; it warns only without ``balance``.
    """

    def __init__(self, balance: float | None = None, compare: Compare | None = "once") -> None:
        if balance is not None and not (isinstance(balance, int | float) and balance >= 0):
            raise ValueError(f"balance is a ratio of gradient norms, at least 0, got {balance!r}")
        if compare not in ("once", "epoch", "step", None):
            raise ValueError(f"compare_gradients must be 'once', 'epoch', 'step' or None, got {compare!r}")
        self.balance, self.compare, self.warns = balance, compare, balance is None
        self.reset()

    def reset(self) -> None:
        """Forget earlier comparisons, when a fit begins."""
        self._epoch: int | None = None  # of the last comparison
        self._told: set[str] = set()

    def is_due(self, step: int, epoch: int) -> bool:
        """True if gradients are compared in this step, provided that it is logged."""
        if self.compare == "step":
            return True
        if self.compare is None or step < _FIRST_STEP:
            return False
        return self._epoch is None or (self.compare == "epoch" and epoch > self._epoch)

    def apply(
        self,
        terms: dict[str, Tensor],
        task: Tensor,
        features: StepFeatures,
        distiller: Distiller,
        *,
        epoch: int = 0,
        step: int = 0,
        scale: Scale | None = None,
        compare: bool = False,
    ) -> dict[str, Tensor]:
        """Scale terms in place if there is a ``balance``, and compare gradients. Collective: all ranks must call it.

        Graphs are retained, parameters receive no gradient, and the factors have none. ``scale`` is that of a gradient
        scaler, without which half-precision gradients of feature maps may underflow. Returns values to log:
        ``balance/<term>``, the weight that balances a term, and ``gradient/<term>``, the norm of the weighted term's
        gradient divided by that of the task loss.
        """
        try:
            recomputes = self.balance is not None and features.parts == 1
            with nullcontext() if recomputes else _refuse_forward_passes():
                norms = {
                    name: measure_norms(value, task, distiller.bound[name], features, distiller.group, scale)
                    for name, value in terms.items()
                }
        except RuntimeError as error:
            if self.balance is None:  # a compiled graph, or activation checkpointing
                self._epoch = epoch
                _log.debug("the gradients of %s and task loss cannot be compared: %s", ", ".join(terms), error)
                return {}
            raise RuntimeError(
                f"balance: the gradients at the student's layer cannot be computed ({error}); leave out compiling and "
                "micro_batch, name a layer after them, or set weights by hand"
            ) from error
        logged = {}
        for name, (of_term, of_task) in norms.items():
            weight = distiller.weight_of(name, epoch)
            if self.balance is not None:
                if of_task is None:
                    raise ValueError(
                        f"balance: the task loss does not depend on the layer that {name} reads, so gradients cannot "
                        "be compared there; name a layer that the task loss depends on, or set weights by hand"
                    )
                # NaN if the gradient overflows, after which a gradient scaler lowers its scale
                factor = torch.where(of_term > 0, of_task / torch.where(of_term > 0, of_term, 1), 0)
                factor = torch.where(of_term.isfinite(), factor, torch.nan).to(terms[name].dtype)
                factor = self.balance * abs(weight) * factor
                terms[name], of_term = factor * terms[name], factor * of_term
                logged[f"balance/{name}"] = factor * weight
            if compare and of_task is not None:
                logged[f"gradient/{name}"] = torch.where(of_term == 0, 0, of_term / of_task)
        if compare:
            if all(norm is None or norm.isfinite() for both in norms.values() for norm in both):
                self._epoch = epoch  # otherwise again, once a gradient scaler has lowered its scale
            if self.warns and step >= _FIRST_STEP and rank_and_size(distiller.group)[0] == 0:
                for name, (of_term, of_task) in norms.items():
                    self._tell(name, of_term, of_task, distiller, epoch, step)
        return logged

    def _tell(
        self, name: str, of_term: Tensor, of_task: Tensor | None, distiller: Distiller, epoch: int, step: int
    ) -> None:
        """Say once that a term's gradient is far from the task's, with the weight that would make them equal."""
        if name in self._told:
            return
        bound = distiller.bound[name]
        reads = bound.loss.reads if isinstance(bound.loss.reads, str) else " and ".join(bound.loss.reads)
        where = f"the student's {reads.replace('_', ' ')}"
        if of_task is None:
            self._told.add(name)
            _log.info("%s: the task loss does not depend on %s, so its weight cannot be compared", name, where)
            return
        ratio = float(of_term) / float(of_task) if of_task > 0 else 0.0
        if not ratio < float("inf") or ratio == 0 or _LEAST <= ratio <= _MOST:
            return
        self._told.add(name)
        weight = distiller.weight_of(name, epoch)
        alone = len(distiller.losses) == 1 and bound.weight == 1
        setting = f"weight={_round(weight / ratio)}" if alone else f"a weight of {_round(weight / ratio)}"
        warnings.warn(
            f"{name}: its gradient at {where} is {_round(ratio)} times the task loss's (step {step}); "
            f"{setting} instead of {weight:.6g} would make them equal, and balance=1 does so in every step",
            WeightWarning,
            stacklevel=2,
        )


def measure_norms(
    term: Tensor,
    task: Tensor,
    bound: BoundLoss,
    features: StepFeatures,
    group: Group = None,
    scale: Scale | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norms of the gradients of a term and of the task loss at the features that the term reads, over all ranks.

    Reading a layer may pool, reshape or copy its output, while the task loss depends on the output itself. The norms
    are then those at the output: the search goes back through operations without parameters.
    """
    at: Sequence[Tensor | GradientEdge] = [x for x in bound.student_tensors(features.student) if x.requires_grad]
    places: list[Tensor | GradientEdge] = []
    of_task: list[Tensor] = []
    with torch.autocast(term.device.type, enabled=False):  # a backward pass should not run under autocast
        for _ in range(_DEPTH if task.requires_grad else 0):
            if not at:
                break
            pairs = list(zip(at, _compute_gradients(task, at, scale), strict=True))
            places += [x for x, gradient in pairs if gradient is not None]
            of_task += [gradient for _, gradient in pairs if gradient is not None]
            at = list(dict.fromkeys(edge for x, gradient in pairs if gradient is None for edge in _list_parents(x)))
        of_term = [x for x in _compute_gradients(term, places, scale) if x is not None] if places else []
    return _compute_norm(of_term, term, group), _compute_norm(of_task, term, group) if places else None


@contextmanager
def _refuse_forward_passes() -> Iterator[None]:
    """Refuse the forward passes of activation checkpointing, whose activations would stay until the graph is freed."""

    def refuse(module: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("activation checkpointing recomputes what lies between the layer and the task loss")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _compute_gradients(loss: Tensor, at: Any, scale: Scale | None) -> tuple[Tensor | None, ...]:
    scaled = loss if scale is None else scale(loss)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(scaled, at, retain_graph=True, allow_unused=True)
    return gradients


def _list_parents(place: Tensor | GradientEdge) -> list[GradientEdge]:
    """Inputs of the operation that made a tensor; none of an operation with parameters, which is part of a network."""
    node = place.grad_fn if isinstance(place, Tensor) else place.node
    if node is None:
        return []
    if "CompiledFunction" in node.name():
        raise RuntimeError("the layer lies inside a compiled graph")
    parents = [GradientEdge(parent, number) for parent, number in node.next_functions if parent is not None]
    return [] if any("AccumulateGrad" in edge.node.name() for edge in parents) else parents


def _compute_norm(gradients: list[Tensor], like: Tensor, group: Group) -> Tensor:
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in gradients]
    total = torch.stack(squares).sum() if squares else like.detach().new_zeros((), dtype=torch.float32)
    return sum_over_ranks(total, group).sqrt()


def _round(x: float) -> str:
    return f"{float(f'{x:.2g}'):g}"
