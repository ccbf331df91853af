"""The command line in processes of its own, each with all that it starts in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MAIN = "import sys; from lightning_rkd.cli.main import main; sys.exit(main())"

LETTERS = [
    "--data.max_classes=20",
    "--data.image_size=12",
    "--data.classes_per_batch=4",
    "--data.samples_per_class=3",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
"""Options that make a recipe of letters small."""


def start(*args: str, first: str = "") -> subprocess.Popen[str]:
    """Start the command, as a user's script would; ``first`` is run before it, in the same process.

    The script is a file: Lightning starts further ranks as the first one was started.
    """
    Path("command.py").write_text(f"{first}\n{MAIN}")
    program = [sys.executable, "command.py", *args]
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def left(process: subprocess.Popen[str]) -> list[int]:
    """The processes of its session that still run, zombies apart."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def end_of(process: subprocess.Popen[str], within: float = 240) -> tuple[int, str]:
    """Exit code and output of the process, after the last process that it started has ended, too."""
    deadline = time.monotonic() + within
    try:
        output, _ = process.communicate(timeout=within)
        while left(process):
            assert time.monotonic() < deadline, f"processes are left: {left(process)}\n{output}"
            time.sleep(0.05)
        return process.returncode, output
    finally:
        for pid in left(process):
            os.kill(pid, signal.SIGKILL)
