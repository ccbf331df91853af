"""Detection of networks whose inputs are not the rows of the batch, in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import FeatureReader, Hook, Recorder
from lightning_rkd.distillation.layers import find_layer

STEPS, ROWS, COLUMNS = 2, 64, 4096


class RowCheck(Recorder):
    """Compares the inputs of the modules around the student's layer with the batch, in the first steps of a fit.

    A step may permute, resample or mix its batch before the network runs. The teacher receives the batch as it was
    loaded, so that relations would pair wrong rows. Inputs that are normalised or augmented row by row are accepted,
    and so are those that cannot be told apart from them.
    """

    def __init__(self, student: FeatureReader) -> None:
        super().__init__()
        self.student, self.steps_left = student, 0

    def attach(self, network: nn.Module) -> None:
        """Hook the layers and the modules around them."""
        self.detach()
        names = {id(module): name for name, module in network.named_modules()}
        layers = {names.get(id(find_layer(network, tap.layer))) for taps in self.student.taps.values() for tap in taps}
        inside = {part for layer in layers if layer is not None for part in _list_path(layer)}
        modules = [network.get_submodule(name) for name in sorted(inside, key=len)]
        self._handles = [
            module.register_forward_pre_hook(Hook(partial(self._record, number)), with_kwargs=True)
            for number, module in enumerate(modules)
        ]
        self.steps_left = STEPS

    def check(self, inputs: Any) -> None:
        """Warn, once, if a module received rows of the batch in another order, or mixed; after that, remove the hooks.

        Hooks in compiled code, which record nothing, stay: without them it would be compiled again.
        """
        calls, self.steps_left = self._collect_calls(), self.steps_left - 1
        for x in (given for one in calls for given in one[-1:]):
            batch = [rows for rows in _list_tensors(inputs) if rows.shape[1:] == x.shape[1:]]
            if any(map(partial(_is_same, x), batch)):
                continue
            found = next(filter(None, (find_moved_rows(x, rows, exact=len(batch) > 1) for rows in batch)), None)
            if found is not None:
                warnings.warn(
                    f"the student's inputs are not the rows of the batch in order: {found}, while the teacher receives "
                    "the batch, so that relations pair different samples. Name the layer whose inputs the teacher "
                    "shall receive, input_layer=..., or permute and mix the batch before the step",
                    stacklevel=2,
                )
                self.steps_left = 0
                break
        if self.steps_left <= 0:
            for handle, one in zip(self._handles, calls, strict=True):
                if one:
                    handle.remove()

    def _record(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self.on or self.student.ran_with_gradient:
            return
        if tensors := list(_list_tensors([*args, kwargs])):
            self._add_call(number, tensors[0].detach())


@torch.no_grad()
def find_moved_rows(x: Tensor, batch: Tensor, *, exact: bool = False) -> str | None:
    """Description of how a network's input differs from the rows of a batch in order; ``None`` if not, or in doubt.

    Two rows are the same sample if they are equal or, unless ``exact``, in at least 32 columns, correlated, since rows
    may have been normalised.
    """
    if min(len(x), len(batch)) < 3 or x.device != batch.device or _is_same(x, batch):
        return None
    aligned, columns = len(x) == len(batch), batch[0].numel()
    real = x.is_floating_point() and batch.is_floating_point()
    linear = real and columns >= 32 and not exact
    step = -(-columns // COLUMNS)
    a, b = x.flatten(1)[:, ::step].float(), batch.flatten(1)[:, ::step].float()
    if linear:
        a, b = a - a.mean(0), b - b.mean(0)
        similar = (_scale_rows(_scale_columns(a)) @ _scale_rows(_scale_columns(b)).T)[:ROWS]
    elif real or columns >= 4:
        similar = (a[:ROWS, None] == b).all(2).float()
    else:
        return None
    own = torch.arange(len(similar), device=x.device)
    at_own = similar[own, own] if aligned else torch.full_like(similar[:, 0], -1)
    best = similar.amax(1)
    moved = int(((best > 0.9) & (best > at_own + 0.1)).sum())
    if moved > len(own) / 4:
        return f"{moved} of {len(own)} rows are those of other samples"
    if aligned and linear:
        a, b = _scale_rows(a)[:ROWS], _scale_rows(b)
        at_own = (a * b[:ROWS]).sum(1)
        rest = _scale_rows(a - at_own[:, None] * b[:ROWS])  # what a row has besides its own sample
        partner = rest @ b.T / (1 - (b[:ROWS] @ b.T).square()).clamp(min=0.01).sqrt()
        mixed = int(((at_own > 0.1) & (at_own < 0.995) & (partner.amax(1) > 0.95)).sum())
        if mixed > len(own) / 2:
            return f"{mixed} of {len(own)} rows are mixtures of two samples"
    return None


def _is_same(x: Tensor, batch: Tensor) -> bool:
    return x.data_ptr() == batch.data_ptr() or (x.device == batch.device and torch.equal(x.to(batch.dtype), batch))


def _scale_rows(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1)


def _scale_columns(rows: Tensor) -> Tensor:
    spread = rows.square().mean(0).sqrt()
    return rows / spread.clamp(min=1e-3 * float(spread.max()) + 1e-12)


def _list_path(layer: str) -> list[str]:
    """A layer and the modules around it."""
    parts = layer.split(".") if layer else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _list_tensors(inputs: Any) -> Iterator[Tensor]:
    """Dense tensors of rows in some inputs."""
    if isinstance(inputs, Tensor):
        plain = type(inputs) in (Tensor, nn.Parameter) and inputs.layout == torch.strided
        if plain and inputs.ndim > 1 and not inputs.is_complex():
            yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _list_tensors(value)
    elif isinstance(inputs, list | tuple):
        for value in inputs:
            yield from _list_tensors(value)
