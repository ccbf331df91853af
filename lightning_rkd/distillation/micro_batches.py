"""Large batches in parts: the gradient of the whole batch with the activations of one part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_rkd.utils.private import count_writes, disable_compilation, tree_leaves, tree_map

Slots = list[tuple[nn.Module, str]]
_seen: WeakSet[nn.Module] = WeakSet()  # networks that have run
_writers: WeakSet[nn.Module] = WeakSet()  # modules that change their buffers


class MicroBatches(nn.Module):
    r"""A network that processes its batch in micro-batches, for losses that relate the samples of the whole batch.

    .. math:: \frac{\partial L}{\partial \theta} = \sum_m \Big(\frac{\partial s_m}{\partial \theta}\Big)^{\!\top}
        \frac{\partial L}{\partial s_m}

    with :math:`s_m` the outputs of micro-batch m and :math:`L` a function of all outputs. The forward pass keeps the
    outputs, and activations of the last micro-batch only; the backward pass runs the others a second time, with the
    same random numbers and buffers, and uses their activations at once (activation checkpointing along the batch).
    Memory is that of one micro-batch, and time that of almost one more forward pass. Without gradients the network runs
    once.

    Outputs and gradients are those of the whole batch if the network processes each sample by itself. BatchNorm does
    not: it normalises by the statistics of a micro-batch, and updates its running statistics once for each.

    Args:
        network: The network. Its inputs are tensors with one row per sample, or lists, tuples and mappings of them.
        size: Largest number of samples in a micro-batch; all micro-batches have this size, or nearly.

    Raises:
        TypeError: Inputs that cannot be split by rows, or an output without a row per sample.
        ValueError: ``size`` below 1, or inputs with unequal numbers of rows.

    Example:
        >>> network = MicroBatches(nn.Linear(4, 2), size=8)
        >>> output = network(torch.ones(20, 4))  # in parts of 7, 7 and 6
        >>> output.sum().backward()
        >>> output.shape, network.network.bias.grad
        (torch.Size([20, 2]), tensor([20., 20.]))
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        check_size("MicroBatches: size", size)
        self.network, self.size = network, size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the network for the whole batch."""
        inputs = args, kwargs
        parts = count_parts([count_rows(inputs)], self.size)
        if parts == 1:
            return self.network(*args, **kwargs)
        call = partial(_call, self.network)
        output = run_parts(call, split_rows(inputs, parts), self.network)
        if output is None:
            raise TypeError(
                f"MicroBatches: the output of {type(self.network).__name__} must have one row per sample: wrap the "
                "part of the network whose output has"
            )
        return output


def check_size(name: str, size: int | None) -> None:
    """Raise ``ValueError`` unless the size of micro-batches is ``None`` or at least 1."""
    if size is not None and not (isinstance(size, int) and size >= 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def count_parts(counts: list[int], size: int) -> int:
    """Number of parts of at most ``size`` rows, from the number of rows on every rank.

    It is the same on all ranks, since a sharded network communicates in each part, and no part is empty.
    """
    return max(1, min(-(-max(counts) // size), *counts))


def split_rows(inputs: Any, parts: int) -> list[Any]:
    """Split the inputs of a batch into parts whose numbers of rows differ by at most one.

    Tensors without dimensions or with a single row are given to every part.
    """
    rows = count_rows(inputs)

    def select(number: int, x: Any) -> Any:
        return x.tensor_split(parts)[number] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x

    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return [tree_map(partial(select, number), inputs) for number in range(parts)]


def count_rows(inputs: Any) -> int:
    """Number of rows of the inputs of a batch."""
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    if other := {type(x).__name__ for x in leaves if not isinstance(x, Tensor | int | float | None)}:
        raise TypeError(
            f"micro-batches are rows of tensors, but the inputs hold {', '.join(sorted(other))}: convert them to "
            "tensors in the loader, or process the batch at once"
        )
    rows = {len(x) for x in leaves if isinstance(x, Tensor) and x.ndim} - {1}
    if len(rows) > 1:
        raise ValueError(
            f"micro-batches need inputs with one row per sample, but the tensors have {sorted(rows)} rows: expand them "
            "to one number of rows, or process the batch at once"
        )
    return max(rows, default=1)


def refuse_inside(network: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuse layers inside :class:`MicroBatches`, which run several times in a step and again in its backward pass."""
    for path, outer in network.named_modules():
        if isinstance(outer, MicroBatches) and {id(m) for m in outer.network.modules()} & set(map(id, layers)):
            raise ValueError(
                f"the student layer lies inside MicroBatches, of which only the output is that of the whole batch: "
                f"{f'name {path!r} itself' if path else 'leave student_layer out'}, or use "
                "DistillationModule(micro_batch=...), which reads every layer"
            )


@disable_compilation
def run_parts(
    call: Callable[[Any], Any],
    parts: list[Any],
    network: nn.Module,
    repeating: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """Run a network on parts of a batch, keep the activations of the last only, and concatenate the outputs.

    Second passes run in the context ``repeating`` and leave the network's buffers as they are. Entries of the output
    that are not tensors with the rows of a part are ``None``.
    """
    if first_run := network not in _seen:
        _seen.add(network)
        _warn_of_batch_norm(network)
    outputs, slots = [], [(m, name) for m in network.modules() for name, _ in m.named_buffers(recurse=False)]
    for part in parts[:-1] if torch.is_grad_enabled() else ():
        second = _SecondPass(slots, repeating)
        contexts = partial(_pair, second)
        outputs.append(checkpoint(call, part, use_reentrant=False, context_fn=contexts))
        slots = second.forget_unwritten(first_run) if len(outputs) == 1 else slots
    outputs += map(call, parts[len(outputs) :])  # the backward pass begins with the last part, whose activations stay
    rows = [count_rows(part) for part in parts]

    def join(*found: Any) -> Tensor | None:
        fits = all(isinstance(x, Tensor) and x.ndim and len(x) == n for x, n in zip(found, rows, strict=True))
        return torch.cat(found) if fits else None

    return tree_map(join, *outputs)


def _call(network: nn.Module, inputs: tuple[Any, Any]) -> Any:
    args, kwargs = inputs
    return network(*args, **kwargs)


def _warn_of_batch_norm(network: nn.Module) -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if any(m.training and isinstance(m, kinds) for m in network.modules()):
        warnings.warn(
            "BatchNorm normalises each micro-batch by its own statistics, so that training differs from that on the "
            "whole batch at once: for the same gradients replace it by GroupNorm, or call .eval() on these layers",
            stacklevel=2,
        )


def _pair(second: _SecondPass) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), second


class _SecondPass(AbstractContextManager[None]):
    """Context of a second pass, in which buffers and default dtype are those before the first."""

    def __init__(self, slots: Slots, repeating: Callable[[], AbstractContextManager[Any]]) -> None:
        found = [(module, name, module.get_buffer(name)) for module, name in slots]
        self.before = [(module, name, x, x.detach().clone(), count_writes(x)) for module, name, x in found]
        self.repeating, self.dtype = repeating, torch.get_default_dtype()
        self.stack = ExitStack()

    def forget_unwritten(self, compare: bool) -> Slots:
        """Forget the buffers of modules that the first pass has not written to; returns the others."""
        if compare:  # running statistics are written without being counted
            _writers.update(m for m, _, x, before, _ in self.before if not torch.equal(x, before))
        written = {m for m, name, x, _, n in self.before if m.get_buffer(name) is not x or count_writes(x) != n}
        self.before = [entry for entry in self.before if entry[0] in written or entry[0] in _writers]
        return [(module, name) for module, name, *_ in self.before]

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.repeating())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            for module, name, _, before, _ in self.before:
                stack.callback(setattr, module, name, module.get_buffer(name))
                setattr(module, name, before.clone())
            self.stack = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self.stack.close()
