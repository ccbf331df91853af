"""Real processes are killed, and one of two ranks fails: everything ends, and the same command resumes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_rkd.cli import main as cli
from tests.cli.commands.test_compare import runs, written
from tests.cli.conftest import _own_folder  # noqa: F401 # a fixture
from tests.cli.test_recipes import tiny
from tests.harness.processes import GLYPHS, end_of, start

pytestmark = pytest.mark.campaign

TWO = [*GLYPHS, "--data.batches_per_epoch=3", "--trainer.max_epochs=4", "--trainer.default_root_dir=run"]
TWO += ["--trainer.devices=2", "--trainer.strategy=ddp"]


class Fails(pl.Callback):
    """One rank fails in the third epoch."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank = how, rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != 7:
            return
        if self.how == "NaN":
            batch[0].fill_(torch.nan)
        else:  # whatever the main thread is doing then: mostly, it waits for the other rank
            threading.Timer(0.01, os.kill, (os.getpid(), getattr(signal, self.how))).start()


@pytest.mark.parametrize(("how", "rank"), [("SIGTERM", 0), ("SIGKILL", 1), ("NaN", 1)])
def test_when_one_rank_fails_all_end_and_the_last_checkpoint_is_whole(how: str, rank: int) -> None:
    callback = {"class_path": "tests.campaigns.test_kills.Fails", "init_args": {"how": how, "rank": rank}}
    fit = ["fit", "--config", "glyphs_student", *TWO, "--trainer.callbacks+", json.dumps(callback)]
    code, output = end_of(start(*fit))
    # Lightning kills the first rank when it finds another dead before the first has noticed
    assert code in (143 if how == "SIGTERM" else 1, -signal.SIGKILL), output
    if how == "NaN":
        assert "train/task is NaN or infinite" in output
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 6


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL in the third epoch of shuffled, augmented glyphs with a teacher; then resume from last.ckpt."""
    assert cli.main(["fit", "--config", "glyphs_teacher", *tiny("glyphs_teacher")]) == 0
    options = [option for option in tiny("glyphs_rkd", weights=True) if "max_epochs" not in option]
    options += ["--data.batches_per_epoch=6", "--trainer.max_epochs=5", "--trainer.limit_val_batches=0"]
    fit = ["fit", "--config", "glyphs_rkd", *options]

    def process(folder: str, *extra: str) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "lightning_rkd.cli"]
        return subprocess.Popen([*program, *fit, "--trainer.default_root_dir", folder, *extra])

    slow = {"class_path": "tests.campaigns.test_kills.Slowly", "init_args": {"file": str(tmp_path / "epoch")}}
    whole = process("whole")
    killed = process("killed", f"--trainer.callbacks+={json.dumps(slow)}")
    while killed.poll() is None and not (tmp_path / "epoch").exists():
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was still running"
    left = torch.load("killed/last.ckpt", weights_only=True)
    assert left["global_step"] == 12, "the second epoch was saved, the third was under way"
    assert process("killed", "--ckpt_path", "killed/last.ckpt").wait() == 0
    assert whole.wait() == 0
    a, b = (torch.load(f"{folder}/last.ckpt", weights_only=True) for folder in ("whole", "killed"))
    assert a["global_step"] == b["global_step"] == 30
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])


class Slowly(pl.Callback):
    """Says that the third epoch is under way, and then waits to be killed."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 15:
            self.file.touch()
            time.sleep(60)


def test_killed_at_any_time_a_comparison_resumes_to_the_same_table() -> None:
    """SIGKILL at random moments, counted in files of the runs; no process outlives the command."""
    whole, killed = (["compare", "--config", written(), "--out", out] for out in ("whole", "killed"))
    assert cli.main(whole) == 0
    rng = random.Random(5)
    for files in (rng.randint(2, 6), rng.randint(7, 11)):  # of 5 configurations, checkpoints and results
        process = start(*killed, "--jobs", "2")
        while process.poll() is None and len([*Path().glob("killed/*/*.yaml"), *Path().glob("killed/*/*t")]) < files:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        code, output = end_of(process, within=20)
        assert code == -signal.SIGKILL, output
    assert not Path("killed/table.md").exists()
    assert cli.main(killed) == 0
    assert runs("killed") == runs("whole")
    assert len(runs("whole")) == 5
    before = os.stat("whole/rkd-d-1/last.ckpt").st_mtime_ns
    assert cli.main(whole) == 0
    assert os.stat("whole/rkd-d-1/last.ckpt").st_mtime_ns == before
    table = Path("whole/table.md").read_text()
    assert "| alone |" in table
    assert "seeds: 0, 1" in table
    assert Path("whole/plot.png").stat().st_size > 1000
    checkpoint = torch.load("whole/rkd-d-0/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
