"""SIGTERM and dying ranks: runs end at once, and no process outlives them."""

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

PARENT = "LIGHTNING_RKD_FIRST_RANK"
"""Environment variable with the id of the process that started a rank."""

TERMINATED = 128 + 15  # as in shells


@contextmanager
def at_sigterm() -> Iterator[threading.Event]:
    """Turn SIGTERM into ``SystemExit``, so that ``finally`` blocks run as after Ctrl-C; the event says that it came."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        received.set()
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def forward_sigterm(trainer: pl.Trainer) -> None:
    """Send SIGTERM to all ranks that the trainer started.

    Lightning's handler enters a collective wherever the ranks happen to be, so that some of them wait for ever.
    """
    from lightning_rkd.utils.private import set_sigterm_handler  # imports PyTorch, which --help does without

    def notify(signum: int, frame: FrameType | None) -> None:
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        connector.received_sigterm = True  # the batch is the last one even if a destructor swallows the exception

    connector = set_sigterm_handler(trainer, notify)


@contextmanager
def end_with_first_rank(grace: float = 5.0) -> Iterator[None]:
    """End a rank that Lightning's launcher starts inside ``grace`` seconds after the process that started it.

    A rank that waits in a collective on a GPU, or for others to join, would otherwise stay for up to half an hour.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        before = os.environ.get(PARENT)
        os.environ[PARENT] = str(os.getpid())
        try:
            yield
        finally:  # later processes of this one, such as torchrun, are no ranks of this run
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
    time.sleep(grace)  # the rank may have work after the last common step
    rank = os.environ["LOCAL_RANK"]
    print(f"rank {rank}: the process that started this one is gone; ending", file=sys.stderr, flush=True)
    os._exit(1)
