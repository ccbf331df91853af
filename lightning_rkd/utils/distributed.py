"""Everything that knows about ranks: differentiable gathering, sums over ranks, and blocks that travel.

Every function is a plain identity when no process group is initialised.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup``, or ``None`` for the default group."""

T = TypeVar("T")


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` outside a process group.

    Example:
        >>> rank_and_size()
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_objects(value: T, group: Group = None) -> list[T]:
    """A small plain value of every rank, in rank order; every rank must call it.

    Example:
        >>> gather_objects("here")
        ['here']
    """
    _, size = rank_and_size(group)
    every = [value] * size
    if size > 1:
        dist.all_gather_object(every, value, group=group)
    return every


def run_on_all_ranks(work: Callable[[], T], group: Group = None) -> T:
    """Do what may fail on some ranks only, such as reading a file that one machine lacks, and fail on all of them.

    Otherwise the ranks that did not fail would wait for the one that did, and not know why. Every rank must call it.

    Args:
        work: What to do.
        group: Process group.

    Returns:
        What ``work`` returned here.

    Raises:
        RuntimeError: It failed on another rank, which the message names with its machine. Where it failed here, that
            error itself is raised.

    Example:
        >>> run_on_all_ranks(lambda: 5)
        5
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as failure:
        error = failure
    said = gather_objects(None if error is None else f"(on {socket.gethostname()}): {error}", group)
    if error is not None:
        raise error
    if failed := [f"rank {rank} {words}" for rank, words in enumerate(said) if words is not None]:
        raise RuntimeError("; ".join(failed))
    return result


def row_counts(rows: int, device: torch.device | str = "cpu", group: Group = None) -> list[int]:
    """How many rows every rank holds, in rank order.

    ``device`` must suit the backend: CPU for gloo, CUDA for NCCL.

    Example:
        >>> row_counts(3)
        [3]
    """
    _, size = rank_and_size(group)
    if size == 1:
        return [rows]
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group=group)
    return [int(n) for n in torch.cat(every).tolist()]


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
    r"""Concatenate the rows of every rank, in rank order, with a backward that *sums* over ranks.

    With :math:`L_r` the loss rank r computes from the gathered rows, the gradient that reaches the local rows is
    :math:`\sum_r \partial L_r / \partial x`. When every rank computes the same loss, the mean that
    DistributedDataParallel takes over ranks then gives exactly the gradient of one big batch; nothing needs scaling.

    Shapes: x (n_r, ...) on rank r, counts may differ between ranks -> (sum n_r, ...).

    Args:
        x: Local rows. May be empty. All ranks must agree on the trailing shape and dtype.
        counts: Rows per rank as :func:`row_counts` gives them; exchanged here when ``None``.
        group: Process group.

    Example:
        >>> gather_rows(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    _, size = rank_and_size(group)
    if size == 1:
        return x
    if counts is None:
        counts = row_counts(x.shape[0], x.device, group)
    return _GatherRows.apply(x, counts, group)  # type: ignore[no-any-return] # autograd.Function is untyped


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Sum a tensor over ranks, in place, outside the graph; returns it.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    _, size = rank_and_size(group)
    if size > 1:
        dist.all_reduce(x, group=group)
    return x


def blocks_over_ranks(
    parts: tuple[Tensor, ...], block: int, group: Group = None
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Show every rank the rows of all ranks, at most ``block`` rows at a time.

    Blocks come in the same order on every rank: rank 0's rows, then rank 1's, and so on. No rank ever holds more
    than its own rows and one block.

    Args:
        parts: Tensors with the same number of local rows, for example embeddings and labels. Ranks may hold different
            numbers of rows, none included, but must agree on trailing shapes and dtypes.
        block: Rows per block.
        group: Process group.

    Yields:
        The global number of the block's first row, and the block of each part.

    Example:
        >>> [(start, tuple(b.tolist())) for start, (b,) in blocks_over_ranks((torch.arange(5),), 2)]
        [(0, (0, 1)), (2, (2, 3)), (4, (4,))]
    """
    rank, size = rank_and_size(group)
    counts = row_counts(parts[0].shape[0], parts[0].device, group)
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
    """Copies of rows of any ranks, found as all rows travel past; every rank must call it, even for no rows.

    Args:
        parts: Tensors with the same number of local rows, as for :func:`blocks_over_ranks`.
        numbers: (M,) which rows, counted over all ranks in rank order; may repeat, and differ between ranks.
        block: Rows per travelling block.
        group: Process group.

    Example:
        >>> fetch_rows((torch.tensor([5.0, 6.0, 7.0]),), torch.tensor([2, 0, 2]), block=2)
        (tensor([7., 5., 7.]),)
    """
    found = tuple(p.new_empty((len(numbers), *p.shape[1:])) for p in parts)
    for start, blocks in blocks_over_ranks(parts, block, group):
        (here,) = torch.nonzero((numbers >= start) & (numbers < start + len(blocks[0])), as_tuple=True)
        for rows, given in zip(found, blocks, strict=True):
            rows[here] = given[numbers[here] - start]
    return found


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of the anchors that this rank works on, when all ranks hold the same global batch.

    An operator given ``Shard`` computes its part for ``share(n)`` and sums the result over ranks inside its
    forward, so that every rank leaves with the whole loss and the whole gradient.
    """

    group: Group = None

    def range(self, n: int) -> tuple[int, int]:
        """First anchor and the one after the last, out of ``n``, for this rank; shares differ by at most one.

        Example:
            >>> Shard().range(5)
            (0, 5)
        """
        rank, size = rank_and_size(self.group)
        return rank * n // size, (rank + 1) * n // size

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share the work, in place."""
        return sum_over_ranks(x, self.group)


def data_parallel_group(strategy: Any) -> Group:
    """The group over which a Lightning strategy splits the batch: all ranks, except with a model-parallel mesh.

    Tensor-parallel ranks repeat each other's rows, so only the mesh's ``data_parallel`` dimension counts there.

    Example:
        >>> data_parallel_group(object()) is None
        True
    """
    return strategy.device_mesh["data_parallel"].get_group() if has_mesh(strategy) else None


def has_mesh(strategy: Any) -> bool:
    """Whether a Lightning strategy lays its ranks out in a model-parallel mesh.

    Example:
        >>> has_mesh(object())
        False
    """
    mesh = getattr(strategy, "device_mesh", None)
    return "data_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
