"""Finds NaN and infinity in outputs, losses and weights, and collapse, without stopping the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.losses.base import NonFiniteError, Term, at_tap


class CollapseWarning(UserWarning):
    """All rows of the student's embedding are equal: relational losses have no gradient there."""


class FiniteChecks:
    """Finds NaN, infinity and collapse without stopping the step.

    On a CPU the loss itself has already refused non-finite values. On other devices a few flags travel to the host
    while the step goes on, and are looked at when the next one begins.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Any, Callable[[list[float]], None]]] = []
        self._reported = False

    def __reduce__(self) -> tuple[type[FiniteChecks], tuple[()]]:
        return FiniteChecks, ()  # copies start anew: events on a GPU cannot be copied

    def look(self, term: Term, sides: tuple[Any, Any], name: str, step: int, value: Tensor | None = None) -> None:
        """Note the state of what a term has just read, and whether its value has overflowed."""
        read = [[t.detach() for t in at_tap(s, term.tap, term.reads, who=name).tensors(term.reads)] for s in sides]
        if not all(read):
            return
        student = read[0][0]
        bad = [_first_bad(tensors) for tensors in read]
        equal = torch.zeros((), device=student.device)
        if term.reads == "embedding" and term.gather and len(student) > 1:
            equal = (student[1:] == student[:1]).all()
        overflow = torch.zeros_like(equal) if value is None else ~value.detach().isfinite().all()
        flags = torch.stack([*bad, overflow.to(bad[0].dtype), equal.to(bad[0].dtype)])
        self._send(flags, partial(self._report_outputs, name, step))

    def look_at_losses(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Note whether the parts of a step's loss, scalars by name, are finite."""
        bad = torch.stack([~value.detach().isfinite() for value in losses.values()])
        self._send(bad, partial(_report_losses, list(losses), step))

    def _send(self, flags: Tensor, report: Callable[[list[float]], None]) -> None:
        event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((flags, event, report))
        if event is None:
            self.check()

    def check(self, *, wait: bool = False) -> None:
        """Report what has arrived, or, to ``wait``, all that is under way.

        Raises:
            NonFiniteError: With side, row and step.
        """
        waiting, self._waiting = self._waiting, []
        for flags, event, report in waiting:
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                self._waiting.append((flags, event, report))
                continue
            report(flags.tolist())

    def _report_outputs(self, name: str, step: int, flags: list[float]) -> None:
        *bad, overflow, equal = flags
        for side, row in zip(("student", "teacher"), bad, strict=True):
            if row >= 0:
                raise NonFiniteError(
                    f"step {step}: {name}: the {side}'s output holds NaN or infinity, first in row {row}"
                )
        if overflow:
            raise NonFiniteError(
                f"step {step}: {name}: overflow: both sides are finite, but the loss is not. Scale down or normalise "
                "what the networks show, and look for NaN in the loss's own parameters"
            )
        if equal and not self._reported:
            self._reported = True
            warnings.warn(
                f"step {step}: the student has collapsed: all rows of the embedding that {name} reads are equal, "
                "where relational losses have no gradient. Lower the learning rate, or add a task loss",
                CollapseWarning,
                stacklevel=2,
            )


def _report_losses(names: list[str], step: int, flags: list[float]) -> None:
    if bad := [name for name, flag in zip(names, flags, strict=True) if flag]:
        raise NonFiniteError(
            f"step {step}: {' and '.join(bad)} is NaN or infinite: look at the batch (NaN inputs or labels?), or lower "
            "the learning rate; the last checkpoint is from before"
        )


def refuse_broken_weights(module: nn.Module, step: int) -> None:
    """Keep weights with NaN out of checkpoints: they would replace the last sound one.

    A gradient can be NaN where every loss is finite, and the next step, which would notice, comes after the checkpoint.

    Raises:
        NonFiniteError: With the name of the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            raise NonFiniteError(
                f"step {step}: the weights {name!r} hold NaN or infinity, so no checkpoint is written and the last one "
                "stays: lower the learning rate, or clip gradients (--trainer.gradient_clip_val)"
            )


def _first_bad(tensors: list[Tensor]) -> Tensor:
    """The number of the first row with NaN or infinity, or -1, as a tensor on the device."""
    bad = torch.stack([(~t.isfinite()).flatten(1).any(1) for t in tensors]).any(0)
    return torch.where(bad.any(), bad.int().argmax(), -1)
