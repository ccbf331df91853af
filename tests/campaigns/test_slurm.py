"""Under SLURM a job that is told to end saves, is requeued, and continues."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.harness.nodes import surroundings

pytestmark = pytest.mark.campaign

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "distil",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SMALL = {
    "model": {"init_args": {"teacher": {"init_args": {"weights": None}}}},
    "data": {"init_args": {"max_classes": 20, "image_size": 12, "classes_per_batch": 4, "batches_per_epoch": 6}},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
}


class ToldToEnd(pl.Callback):
    """Gets the signal that SLURM sends some time before the end, in the second epoch, before or after a batch."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hook == "start" and trainer.global_step == 8:
            signal.raise_signal(signal.SIGUSR1)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.hook == "end" and trainer.global_step == 8:
            signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize(("hook", "options"), [("end", []), ("start", ["--ckpt_path", "last"])])
def test_a_requeued_job_is_the_uninterrupted_one(
    hook: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    # SLURM ends the processes of a job that it requeues
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\nkill -9 $PPID\n')
    scontrol.chmod(0o755)
    fit = ["fit", "--config", "glyphs_rkd", "--config", "small.yaml", "--trainer.default_root_dir"]
    alone = [sys.executable, "-m", "lightning_rkd.cli", *fit]
    subprocess.run([*alone, "whole"], env=surroundings(tmp_path), timeout=600, check=True)
    told = json.dumps({"class_path": "tests.campaigns.test_slurm.ToldToEnd", "init_args": {"hook": hook}})
    command = [*alone, "requeued_run", *options]
    command.append(f"--trainer.callbacks+={told}")
    environment = surroundings(tmp_path) | JOB | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    assert subprocess.run(command, env=environment, timeout=600).returncode == -signal.SIGKILL
    assert Path("requeued").read_text().split() == ["requeue", "4711"]
    assert Path("requeued_run/hpc_ckpt_1.ckpt").is_file()
    again = [*alone, "requeued_run", *options]
    subprocess.run(again, env=surroundings(tmp_path) | JOB, timeout=600, check=True)
    whole, resumed = (torch.load(f"{folder}/last.ckpt", weights_only=True) for folder in ("whole", "requeued_run"))
    assert resumed["global_step"] == whole["global_step"] == 18
    assert all(torch.equal(resumed["state_dict"][key], value) for key, value in whole["state_dict"].items())
