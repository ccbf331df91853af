"""Runs that are told to stop do so at once, and no process of theirs outlives them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl

from lightning_rkd.utils.private import set_sigterm_handler

PARENT = "LIGHTNING_RKD_FIRST_RANK"
"""Environment variable that tells the processes which a run starts who started them."""

TERMINATED = 128 + 15
"""Exit code after SIGTERM, as shells count."""


class Terminated(SystemExit):
    """SIGTERM came: the scheduler wants the machine back."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Sigterm:
    """Whether SIGTERM came while it was looked out for."""

    received = False


@contextmanager
def at_sigterm() -> Iterator[Sigterm]:
    """Turn SIGTERM into :class:`Terminated`, so that what has been begun is left in order, as after Ctrl-C.

    Example:
        >>> with at_sigterm() as sigterm:
        ...     try:
        ...         signal.raise_signal(signal.SIGTERM)
        ...     except SystemExit as stop:
        ...         print(stop.code, sigterm.received)
        143 True
    """
    sigterm = Sigterm()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield sigterm
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        sigterm.received = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield sigterm
    finally:
        signal.signal(signal.SIGTERM, before)


def pass_sigterm_on(trainer: pl.Trainer) -> None:
    """Let SIGTERM reach all ranks that the trainer started, and none wait for another.

    Lightning's handler calls a collective wherever the ranks happen to be, so that some of them wait for ever.
    """

    def notify(signum: int, frame: FrameType | None) -> None:
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        connector.received_sigterm = True  # should the exception get lost (in a destructor), the batch is the last one

    connector = set_sigterm_handler(trainer, notify)


@contextmanager
def ending_with_first_rank(grace: float = 5.0) -> Iterator[None]:
    """Let a rank that Lightning's launcher starts inside end some seconds after the process that started it.

    A rank that waits for others (to meet, or in a collective on a GPU) would stay for up to half an hour.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        before = os.environ.get(PARENT)
        os.environ[PARENT] = str(os.getpid())
        try:
            yield
        finally:  # what this process starts later, such as torchrun, is no rank of ours
            if before is None:
                del os.environ[PARENT]
            else:
                os.environ[PARENT] = before
    else:
        if (parent := os.environ.get(PARENT)) is not None:
            watch = threading.Thread(target=_watch, args=(int(parent), grace), daemon=True, name="first-rank-observer")
            watch.start()
        yield


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(grace)  # for what a rank has to do after the last common step
    rank = os.environ["LOCAL_RANK"]
    print(f"rank {rank}: the process that started this one is gone; ending", file=sys.stderr, flush=True)
    os._exit(1)
