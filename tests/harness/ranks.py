"""Two real processes for the tests: a pool that joins one gloo group on loopback and lives as long as the session."""

import contextlib
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.harness.forks import FORKS
from tests.harness.platforms import LOOPBACK


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **LOOPBACK)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    try:
        while (job := pipe.recv()) is not None:
            function, args = job
            try:
                pipe.send((function(rank, *args), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


class Ranks:
    """``run(f, *args)`` calls the module-level function ``f(rank, *args)`` on every rank and returns the results."""

    def __init__(self, size: int = 2) -> None:
        port = free_port()
        ends = [FORKS.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = [
            FORKS.Process(target=_serve, args=(r, size, port, theirs), daemon=True)
            for r, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300) -> Sequence[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {timeout} s")
            result, error = pipe.recv()
            results.append(result)
            errors += [f"rank {rank}:\n{error}"] if error else []
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
