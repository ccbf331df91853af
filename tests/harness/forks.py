"""Processes that begin as forks of one that has imported the packages which take seconds to import."""

import multiprocessing as mp
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

FORKS: Any = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
if FORKS.get_start_method() == "forkserver":
    FORKS.set_forkserver_preload(["lightning", "pytorch_metric_learning.losses", "torchvision", "lightning_rkd"])


def redirect(path: Path, *streams: int) -> None:
    """Write what this process prints to a file."""
    with path.open("w") as output:
        for stream in streams:
            os.dup2(output.fileno(), stream)


def run_code(program: str, *argv: str, within: float = 300) -> str:
    """Output of a program in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = FORKS.Process(target=_run_code, args=(program, argv, output, errors))
        process.start()
        process.join(within)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode == 0, errors.read_text()
        return output.read_text()


GROWTH = """
import torch
from pathlib import Path
{setup}
def peak():  # getrusage would give the parent's where that was higher
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
step({small})  # libraries and thread pools
before = peak()
step({large})
print(peak() - before)
"""


def measure_growth(setup: str, small: int, large: int) -> float:
    """MiB by which the peak of a process rises from ``step(small)`` to ``step(large)``, which ``setup`` defines."""
    return float(run_code(GROWTH.format(setup=setup, small=small, large=large)))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


def _run_code(program: str, argv: tuple[str, ...], output: Path, errors: Path) -> None:
    redirect(output, 1)
    redirect(errors, 2)
    sys.argv = ["-c", *argv]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
