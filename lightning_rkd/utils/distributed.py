"""Collective operations: differentiable gathering, sums over ranks, and blocks of rows broadcast to all ranks.

Without an initialised process group every function acts as on a single rank.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup``, or ``None`` for the default group."""

ALONE: Group = "alone"
"""The group of this process only, for which no process group exists."""

T = TypeVar("T")


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """Rank of this process and number of processes in a group; ``(0, 1)`` without a process group."""
    if group == ALONE or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Gather a small picklable value from every rank, in rank order. Collective: every rank must call it."""
    _, size = rank_and_size(group)
    every = [value] * size
    if size > 1:
        dist.all_gather_object(every, value, group=group)
    return every


def run_on_all_ranks(work: Callable[[], T], group: Group = None) -> T:
    """Run a function that may fail on some ranks only, for example on a machine without the file, and fail on all.

    Without this, the other ranks would wait in their next collective operation. An error on this rank is raised
    unchanged, one on another rank as ``RuntimeError`` with the rank and its machine. Collective.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as failure:
        error = failure
    errors = gather_objects(None if error is None else f"(on {socket.gethostname()}): {error}", group)
    if error is not None:
        raise error
    if failed := [f"rank {rank} {message}" for rank, message in enumerate(errors) if message is not None]:
        raise RuntimeError("; ".join(failed))
    return result


def gather_row_counts(rows: int, device: torch.device | str = "cpu", group: Group = None) -> list[int]:
    """Number of rows on every rank, in rank order. ``device`` must suit the backend: CPU for gloo, CUDA for NCCL."""
    _, size = rank_and_size(group)
    if size == 1:
        return [rows]
    every = torch.zeros(size, dtype=torch.int64, device=device)
    dist.all_gather(list(every.chunk(size)), torch.full_like(every[:1], rows), group=group)
    counts: list[int] = every.tolist()
    return counts


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Group) -> Tensor:
        rank, size = rank_and_size(group)
        ctx.group, ctx.start, ctx.stop = group, sum(counts[:rank]), sum(counts[: rank + 1])
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        every = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(every, padded, group=group)
        return torch.cat([rows[:n] for rows, n in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.start : ctx.stop], None, None


def gather_rows(x: Tensor, counts: list[int] | None = None, group: Group = None) -> Tensor:
    r"""Concatenate the rows of every rank, in rank order; the backward pass *sums* gradients over ranks.

    With :math:`L_r` the loss that rank r computes from the gathered rows, the gradient of the local rows is
    :math:`\sum_r \partial L_r / \partial x`. If every rank computes the same loss, averaging over ranks, as
    DistributedDataParallel does, gives exactly the gradient of one big batch.

    Shapes: (n_r, ...) on rank r, n_r possibly 0 -> (sum of n_r, ...); ``counts`` from :func:`gather_row_counts` saves
    their exchange.
    """
    _, size = rank_and_size(group)
    if size == 1:
        return x
    if counts is None:
        counts = gather_row_counts(x.shape[0], x.device, group)
    return _GatherRows.apply(x, counts, group)  # type: ignore[no-any-return] # autograd.Function is untyped


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Sum a tensor over ranks, in place and without gradient, and return it."""
    _, size = rank_and_size(group)
    if size > 1:
        dist.all_reduce(x, group=group)
    return x


def broadcast_blocks(
    parts: tuple[Tensor, ...], block: int, group: Group = None
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Iterate over the rows of all ranks in blocks that are broadcast from rank to rank.

    The parts are tensors with the same number of local rows, which may differ between ranks and be 0. All ranks receive
    the same blocks of at most ``block`` rows in rank order, each with the global number of its first row. A rank never
    holds more than its own rows and one block.
    """
    rank, size = rank_and_size(group)
    counts = gather_row_counts(parts[0].shape[0], parts[0].device, group)
    first = 0
    for source, count in enumerate(counts):
        for start in range(0, count, block):
            stop = min(start + block, count)
            if source == rank:
                blocks = tuple(p[start:stop].contiguous() for p in parts)
            else:
                blocks = tuple(p.new_empty((stop - start, *p.shape[1:])) for p in parts)
            if size > 1:
                for b in blocks:
                    dist.broadcast(b, src=source if group is None else dist.get_global_rank(group, source), group=group)
            yield first + start, blocks
        first += count


def fetch_rows(parts: tuple[Tensor, ...], numbers: Tensor, block: int, group: Group = None) -> tuple[Tensor, ...]:
    """Copy rows from any ranks by their global numbers (M,). Collective, even for a rank that needs no rows.

    The parts are those of :func:`broadcast_blocks`; the numbers may repeat, and differ between ranks.
    """
    found = tuple(p.new_empty((len(numbers), *p.shape[1:])) for p in parts)
    for start, blocks in broadcast_blocks(parts, block, group):
        (here,) = torch.nonzero((numbers >= start) & (numbers < start + len(blocks[0])), as_tuple=True)
        for rows, given in zip(found, blocks, strict=True):
            rows[here] = given[numbers[here] - start]
    return found


@dataclass(frozen=True, slots=True)
class Shard:
    """Splits the work on a global batch, which all ranks hold, over the ranks.

    An operator that takes a shard computes the terms of the rows in :meth:`range` and adds up the results of all ranks
    with :meth:`sum` in its forward pass, so that every rank has the whole loss and the whole gradient.
    """

    group: Group = None

    def range(self, n: int) -> tuple[int, int]:
        """Start and stop of this rank's share of ``n`` rows; shares differ by at most one row."""
        rank, size = rank_and_size(self.group)
        return rank * n // size, (rank + 1) * n // size

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        return sum_over_ranks(x, self.group)


def data_parallel_group(strategy: Any) -> Group:
    """Process group over which a Lightning strategy splits batches.

    ``None``, the group of all ranks, except for a model-parallel mesh, whose tensor-parallel ranks hold the same rows:
    there it is the group of the mesh dimension ``data_parallel``.
    """
    return strategy.device_mesh["data_parallel"].get_group() if has_mesh(strategy) else None


def has_mesh(strategy: Any) -> bool:
    """True if a Lightning strategy arranges its ranks in a model-parallel mesh."""
    mesh = getattr(strategy, "device_mesh", None)
    return "data_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
