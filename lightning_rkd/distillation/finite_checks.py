"""Detection of NaN, infinity and collapse without waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.losses.base import NonFiniteError


class CollapseWarning(UserWarning):
    """All rows of the student's embedding are equal: relational losses have no gradient there."""


class FiniteChecks:
    """Detects NaN, infinity and collapse without waiting for the device.

    On a CPU the loss itself raises an error for values that are not finite. On other devices a few flags are copied to
    the host during the step and read when the next one starts.
    """

    def __init__(self) -> None:
        self.collapse_reported = False
        self.waiting: list[tuple[Tensor, Any, Callable[[list[float]], None]]] = []

    def __reduce__(self) -> tuple[type[FiniteChecks], tuple[()]]:
        return FiniteChecks, ()  # CUDA events cannot be copied

    def check_features(self, bound: Any, inputs: tuple[Any, Any], value: Tensor, name: str, step: int) -> None:
        """Check the inputs of a loss (a ``BoundLoss``) and its value."""
        loss = bound.loss
        if loss.reads == "classifier":  # without a row per sample
            return
        read = [[t.detach() for t in bound.list_tensors(x)] for x in inputs]
        if not all(read):
            return
        student = read[0][0]
        bad = [_first_bad_row(tensors) for tensors in read]
        equal = torch.zeros((), device=student.device)
        if loss.reads == "embedding" and loss.gather and len(student) > 1:
            equal = (student[1:] == student[:1]).all()
        overflow = ~value.detach().isfinite().all()
        flags = torch.stack([*bad, overflow.to(bad[0].dtype), equal.to(bad[0].dtype)])
        self._send(flags, partial(self._report_features, name, step))

    def check_losses(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Check the parts of a step's loss, scalars by name."""
        bad = torch.stack([~value.detach().isfinite() for value in losses.values()])
        self._send(bad, partial(_report_losses, list(losses), step))

    def report(self, *, wait: bool = False) -> None:
        """Raise errors and warnings for the flags that have arrived; with ``wait``, wait for all flags."""
        waiting, self.waiting = self.waiting, []
        for flags, event, report in waiting:
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                self.waiting.append((flags, event, report))
                continue
            report(flags.tolist())

    def report_collapse(self, name: str, step: int) -> None:
        """Warn, once, that all rows of the student's embedding are equal."""
        if not self.collapse_reported:
            self.collapse_reported = True
            warnings.warn(
                f"step {step}: the student has collapsed: all rows of the embedding that {name} reads are equal, "
                "where relational losses have no gradient. Lower the learning rate, or add a task loss",
                CollapseWarning,
                stacklevel=2,
            )

    def _send(self, flags: Tensor, report: Callable[[list[float]], None]) -> None:
        event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.waiting.append((flags, event, report))
        if event is None:
            self.report()

    def _report_features(self, name: str, step: int, flags: list[float]) -> None:
        *bad, overflow, equal = flags
        for network, row in zip(("student", "teacher"), bad, strict=True):
            if row >= 0:
                raise NonFiniteError(
                    f"step {step}: {name}: the {network}'s output holds NaN or infinity, first in row {row}"
                )
        if overflow:
            raise NonFiniteError(
                f"step {step}: {name}: overflow: the inputs are finite, but the loss is not. Scale down or normalise "
                "the features, and look for NaN in the loss's own parameters"
            )
        if equal:
            self.report_collapse(name, step)


def _report_losses(names: list[str], step: int, flags: list[float]) -> None:
    if bad := [name for name, flag in zip(names, flags, strict=True) if flag]:
        raise NonFiniteError(
            f"step {step}: {' and '.join(bad)} is NaN or infinite: check the batch (NaN inputs or labels?), or lower "
            "the learning rate; the last checkpoint is from before"
        )


def refuse_broken_weights(module: nn.Module, step: int) -> None:
    """Refuse to checkpoint weights with NaN, which would replace the last good checkpoint.

    A gradient can be NaN although every loss is finite, and the checks of the next step come after the checkpoint.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            raise NonFiniteError(
                f"step {step}: the weights {name!r} hold NaN or infinity, so no checkpoint is written and the last one "
                "stays: lower the learning rate, or clip gradients (--trainer.gradient_clip_val)"
            )


def _first_bad_row(tensors: list[Tensor]) -> Tensor:
    """Number of the first row with NaN or infinity, or -1, as a tensor on the device."""
    bad = torch.stack([(~t.isfinite()).flatten(1).any(1) for t in tensors]).any(0)
    return torch.where(bad.any(), bad.int().argmax(), -1)
