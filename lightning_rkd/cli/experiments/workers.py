"""Processes that work through tasks side by side, and end when the process that started them does, however it ends.

Tasks and answers are lines of JSON through pipes. A worker whose input ends, ends: that is what it sees when its parent
was killed. Nothing needs to be put in order then, because files are whole or not there.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

Message = dict[str, Any]

_BEGIN = "from lightning_rkd.cli.experiments.workers import _work; _work()"


class Worker:
    """One process, and the thread that hears from it.

    Args:
        target: ``"module:function"``, called as ``function(task, report)`` for every task.
        heard: Where ``(worker, message)`` is put: what the function reports, and at last ``{"event": "done"}`` or
            ``{"event": "failed", "error": ...}``, also if the process dies.
        threads: That PyTorch uses in it.
    """

    def __init__(self, target: str, heard: queue.Queue[tuple[Worker, Message]], threads: int) -> None:
        numbers = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **numbers},
            text=True,
        )
        self.heard, self.busy = heard, False
        self._listener = threading.Thread(target=self._hear, daemon=True)
        self._listener.start()

    def give(self, task: Message, log: Path) -> None:
        """Hand over a task; what is printed meanwhile goes to ``log``."""
        self.busy = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"task": task, "log": str(log)}) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has died, which is heard of otherwise
            pass

    def close(self) -> None:
        """End it, whatever it does."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.heard.put((self, json.loads(line)))
        code = self.process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        self.heard.put((self, {"event": "ended", "error": f"its process has ended ({how})"}))


@contextmanager
def closing(workers: list[Worker]) -> Iterator[None]:
    """End all of them at the end, also after Ctrl-C."""
    try:
        yield
    finally:
        for worker in workers:
            if worker.process.stdin is not None and not worker.process.stdin.closed:
                with suppress(OSError):
                    worker.process.stdin.close()
        for worker in workers:
            worker.close()


def threads_each(jobs: int) -> int:
    """The cores that this process may use, divided among workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def _work() -> None:
    """What a worker does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    tasks: queue.Queue[Message] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, tasks), daemon=True).start()

    def report(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(dict(message)) + "\n")
        answers.flush()

    module, _, name = sys.argv[1].partition(":")
    target: Callable[[Message, Callable[[Mapping[str, Any]], None]], None] = getattr(import_module(module), name)
    while True:
        given = tasks.get()
        _print_to(given["log"])
        try:
            target(given["task"], report)
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            first = (str(error).strip().splitlines() or [""])[0]
            known = isinstance(error, ValueError | OSError) and first
            report({"event": "failed", "error": first if known else f"{type(error).__name__}: {first}"})
        else:
            report({"event": "done"})


def _listen(source: TextIO, tasks: queue.Queue[Message]) -> None:
    for line in source:
        tasks.put(json.loads(line))
    os._exit(0)


def _print_to(log: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
