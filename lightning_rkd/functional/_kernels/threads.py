"""Ranges of a loop of native code on as many threads as PyTorch has."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None


def shares(count: int, smallest: int = 1) -> int:
    """Number of ranges for ``count`` items, of which ``smallest`` are worth a thread, at most PyTorch's threads."""
    return max(1, min(torch.get_num_threads(), count // max(1, smallest)))


def in_ranges(work: Callable[[int, int, int], object], count: int, parts: int) -> None:
    """Call ``work(part, start, stop)`` for ``parts`` ranges that cover ``range(count)``, all at the same time.

    The first range runs in the calling thread. Threads save time only where ``work`` releases the interpreter's lock,
    as native code does. An exception is raised once all ranges are done. After a fork the child makes its own threads.
    """
    limits = [count * part // parts for part in range(parts + 1)]
    others = [_submit(work, part, limits[part], limits[part + 1]) for part in range(1, parts)]
    try:
        work(0, limits[0], limits[1])
    finally:
        failed = [error for other in others if (error := other.exception()) is not None]
    if failed:
        raise failed[0]


def _submit(work: Callable[[int, int, int], object], *args: int) -> Future[object]:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="lightning-rkd")
    return _pool.submit(work, *args)


if hasattr(os, "register_at_fork"):  # the child inherits the pool but not its threads
    os.register_at_fork(after_in_child=lambda: globals().update(_pool=None))
