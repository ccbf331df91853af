"""Worker processes that end with the process that started them, however that one ends.

This module imports neither PyTorch nor Lightning, so that a new process reacts to signals at once.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Worker:
    """A process that performs one call at a time, and ends when the connection to this process is closed.

    It has an executor of its own, so that a process that dies takes no other process's call with it.
    """

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.executor = ProcessPoolExecutor(1, context, _begin, (theirs, threads))

    def submit(self, function: Callable[..., None], log: Path, *args: Any) -> Future[str]:
        """Call ``function(*args)`` with its output appended to ``log``; the future holds the error, or ``""``."""
        try:
            return self.executor.submit(_call, function, log, args)
        except BrokenProcessPool as error:  # the process was killed between two calls
            (future := Future[str]()).set_exception(error)
            return future


def end_all(workers: Sequence[Worker]) -> None:
    """End workers at once, whatever they do."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.executor.shutdown()


_parent: Connection
"""Connection of a worker to the process that started it."""


def report(*values: Any) -> None:
    """Send values from a worker to the process that started it, which reads them from ``Worker.connection``."""
    _parent.send(values)


def _begin(parent: Connection, threads: int) -> None:
    global _parent
    _parent = parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes its workers
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    _parent.poll(None)  # the parent sends nothing: readable means closed, by its death or on purpose
    os._exit(1)


def _call(function: Callable[..., None], log: Path, args: tuple[Any, ...]) -> str:
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(*args)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        first = (str(error).strip().splitlines() or [""])[0]
        return first if isinstance(error, ValueError | OSError) and first else f"{type(error).__name__}: {first}"
    return ""
