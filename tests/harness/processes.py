"""The command line and scripts in processes of their own."""

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.harness.forks import FORKS, redirect

MAIN = """
import sys
from lightning_rkd.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""

GLYPHS = [
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
"""Options that make a recipe of glyphs small."""


def import_file(path: Path) -> Any:
    """The module in a file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def wait_for_end(pid: int, within: float = 60) -> None:
    """Wait until a process has ended, or is a zombie."""
    deadline = time.monotonic() + within
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "it has not ended"
        time.sleep(0.01)


def run_script(file: Path, within: float = 300) -> tuple[int | None, str]:
    """Exit code and output of a script in its own folder, run in a fork of a process that has imported Lightning."""
    said = file.with_suffix(".out")
    process = FORKS.Process(target=_run_script, args=(file, said))
    process.start()
    process.join(within)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, said.read_text()


def _run_script(file: Path, said: Path) -> None:
    redirect(said, 1, 2)
    os.chdir(file.parent)
    sys.argv, sys.path[0:0] = [str(file)], [str(file.parent)]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runpy.run_path(str(file), run_name="__main__")
