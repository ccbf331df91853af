"""Workers perform calls in processes that never outlive the one that started them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from lightning_rkd.cli.experiments.workers import Worker, end_all, report
from tests.harness.platforms import linux_only, posix_only
from tests.harness.processes import wait_for_end


def fail(text: str) -> None:
    print("before", flush=True)
    report("sent", 1)
    raise ValueError(f"{text}\nmore")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_pid(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(99)


def pid_in(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(path.read_text())


def test_errors_and_output_are_kept_and_the_worker_goes_on(tmp_path: Path) -> None:
    worker, log = Worker(1), tmp_path / "new" / "log.txt"
    assert worker.submit(fail, log, "no luck").result(60) == "no luck"
    assert worker.connection.recv() == ("sent", 1)
    assert log.read_text().startswith("before\nTraceback")
    assert worker.submit(fail, log, "again").result(60) == "again"
    assert log.read_text().count("Traceback") == 2
    end_all([worker])


@posix_only
def test_a_process_that_dies_breaks_no_other_workers_calls(tmp_path: Path) -> None:
    workers = [Worker(1), Worker(1)]
    with pytest.raises(BrokenProcessPool):
        workers[0].submit(kill, tmp_path / "0.txt").result(60)
    with pytest.raises(BrokenProcessPool):
        workers[0].submit(fail, tmp_path / "0.txt", "never").result(60)
    assert workers[1].submit(fail, tmp_path / "1.txt", "its own").result(60) == "its own"
    end_all(workers)


@linux_only
def test_busy_workers_are_ended_at_once(tmp_path: Path) -> None:
    worker = Worker(1)
    worker.submit(write_pid, tmp_path / "log.txt", str(tmp_path / "pid"))
    pid = pid_in(tmp_path / "pid")
    end_all([worker])
    wait_for_end(pid)


@linux_only
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from lightning_rkd.cli.experiments.workers import Worker
from tests.cli.experiments.test_workers import write_pid
worker = Worker(1)
worker.submit(write_pid, Path({str(tmp_path / "log.txt")!r}), {str(tmp_path / "pid")!r})
time.sleep(99)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = pid_in(tmp_path / "pid")
    parent.kill()
    parent.wait()
    wait_for_end(pid)
