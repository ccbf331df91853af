"""SIGTERM and dying ranks: every process ends, soon, and says so with its exit code."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_rkd.cli import main as cli
from lightning_rkd.cli.signals import PARENT, at_sigterm, end_with_first_rank
from tests.harness.platforms import linux_only
from tests.harness.processes import wait_for_end


@linux_only
def test_a_rank_ends_after_the_process_that_started_it() -> None:
    """Also where the main thread waits in a collective, or for ranks that will never come."""
    rank = """
import time
from lightning_rkd.cli.signals import end_with_first_rank
with end_with_first_rank(0.1):
    time.sleep(99)
"""
    first = f"""
import os, subprocess, sys
from lightning_rkd.cli.signals import end_with_first_rank
with end_with_first_rank():
    own = os.environ | {{"LOCAL_RANK": "1"}}
    child = subprocess.Popen([sys.executable, "-c", {rank!r}], env=own, stdout=2, stderr=open("said", "w"))
    print(child.pid, flush=True)
"""
    child = int(subprocess.run([sys.executable, "-c", first], check=True, capture_output=True, text=True).stdout)
    wait_for_end(child)
    assert Path("said").read_text() == "rank 1: the process that started this one is gone; ending\n"


def test_ranks_that_somebody_else_starts_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets LOCAL_RANK as well, and looks after its processes itself."""
    monkeypatch.delenv(PARENT, raising=False)
    assert cli.main(["test"]) == 2  # a run in this process leaves nothing to those that it starts later
    assert PARENT not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = threading.active_count()
    with end_with_first_rank():
        assert threading.active_count() == before


def test_sigterm_counts_whatever_else_it_sets_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loader's worker that dies of the same signal is an error that may come first."""

    def fails(args: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise RuntimeError("DataLoader worker is killed")

    monkeypatch.setattr(cli, "_command", fails)
    assert cli.main(["test"]) == 143
    assert capsys.readouterr().err.endswith("terminated\n")


def test_the_handler_of_whoever_calls_is_put_back_and_threads_have_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with at_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
