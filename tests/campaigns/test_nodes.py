"""Two machines are one machine with two devices, and one device with the whole batch; and fail together."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_rkd.cli.trainer import _CheckAllMachines, check_checkpoint, check_writable
from lightning_rkd.models import ConvNet
from tests.harness.nodes import TORCHRUN, Nodes, surroundings
from tests.harness.ranks import Ranks

PROGRAM = ["-m", "lightning_rkd.cli"]
SMALL = {
    "model": {
        "init_args": {
            "student": {"class_path": "tests.harness.nets.Perceptron"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
            "lr_scheduler": None,
        }
    },
    "data": {"init_args": {"max_classes": 40, "image_size": 12, "eval_batch_size": 33, "batches_per_epoch": 3}},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}
RECIPE = ["--config", "glyphs_rkd", "--config", "small.yaml"]
TWO_MACHINES = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp", "--data.classes_per_batch=4"]
TWO_DEVICES = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.classes_per_batch=4"]
ONE_DEVICE = ["--data.classes_per_batch=8"]
LAST = Path("runs", "glyphs_rkd", "last.ckpt")
TEACHER = Path("runs", "glyphs_teacher", "last.ckpt")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip (Debian: iproute2)")
    try:
        made = Nodes(tmp_path)
    except OSError as error:
        pytest.skip(f"this machine makes no network namespaces ({error})")
    yield made
    made.close()


def with_recipe(folder: Path) -> Path:
    """A folder in which the recipe is small."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def copy(file: Path, start: Path, *folders: Path) -> None:
    for folder in folders:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(start / file, folder / file)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / LAST, weights_only=True)
    assert state["global_step"] == 6
    weights: dict[str, torch.Tensor] = state["state_dict"]
    return weights


def logged(folder: Path, stage: str) -> dict[str, float]:
    """The last values of each metric of a stage, as they were logged."""
    values: dict[str, Any] = {}
    for path in sorted(folder.glob("runs/glyphs_rkd/lightning_logs/*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            values |= {name: value for name, value in row.items() if name.startswith(f"{stage}/") and value}
    return {name: float(value) for name, value in values.items()}


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("runs/glyphs_rkd/**/*") if path.is_file())


@pytest.mark.campaign
def test_two_machines_train_and_test_as_one(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = with_recipe(tmp_path / "one"), with_recipe(tmp_path / "two")
    monkeypatch.chdir(one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(one / "cache"))
    (one / TEACHER).parent.mkdir(parents=True)
    torch.save(ConvNet((24, 48, 96), 128, normalize=True).state_dict(), one / TEACHER)
    draw = "from lightning_rkd.data import GlyphDataModule; GlyphDataModule(image_size=12).prepare_data()"
    subprocess.run([sys.executable, "-c", draw], env=surroundings(one), timeout=300, check=True)  # the glyphs, once
    for folder in (two, *map(with_recipe, nodes.folders)):
        copy(TEACHER, one, folder)
        shutil.copytree(one / "cache", folder / "cache")

    assert nodes.torchrun(*PROGRAM, "fit", *RECIPE, *TWO_MACHINES) == [0, 0], nodes.said(0) + nodes.said(1)
    assert written(nodes.folders[0]) == ["config.yaml", "hparams.yaml", "last.ckpt", "metrics.csv"]
    assert written(nodes.folders[1]) == []
    command = [*TORCHRUN, "--standalone", "--nnodes", "1", "--nproc-per-node", "2", *PROGRAM, "fit", *RECIPE]
    done = subprocess.run([*command, *TWO_DEVICES], cwd=two, env=surroundings(two), timeout=300, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    alone = [sys.executable, *PROGRAM]
    subprocess.run([*alone, "fit", *RECIPE, *ONE_DEVICE], cwd=one, env=surroundings(one), timeout=300, check=True)

    machines, devices, device = (trained(folder) for folder in (nodes.folders[0], two, one))
    assert all(torch.equal(machines[name], devices[name]) for name in device)
    assert max(float((machines[name] - device[name]).abs().max()) for name in device) <= 1e-6
    validated = logged(one, "val")
    assert 0 < validated["val/recall_at_1"] < 1
    assert logged(nodes.folders[0], "val") == logged(two, "val") == pytest.approx(validated, abs=1e-6)

    # what training left lies on the first machine only
    test = [*PROGRAM, "test", *RECIPE, *TWO_MACHINES, "--ckpt_path", str(LAST)]
    assert nodes.torchrun(*test) == [1, 1]
    lacking = f"the checkpoint {str(LAST)!r} does not exist"
    assert f"rank 1 (on {os.uname().nodename}): {lacking}" in nodes.said(0)
    assert f"error: {lacking}" in nodes.said(1)
    copy(LAST, nodes.folders[0], nodes.folders[1], one)
    assert nodes.torchrun(*test) == [0, 0], nodes.said(0) + nodes.said(1)
    last = [*RECIPE, *ONE_DEVICE, "--ckpt_path", str(LAST)]
    subprocess.run([*alone, "test", *last], cwd=one, env=surroundings(one), timeout=300, check=True)
    tested = logged(one, "test")
    assert tested.keys() == {"test/map_at_r", "test/r_precision", "test/recall_at_1"}
    assert logged(nodes.folders[0], "test") == tested


# Files that one machine lacks


def looked_at(rank: int, folder: str, sought: str, path: str | None = None) -> None:
    mine = f"{folder}/{rank}"
    check = partial(check_checkpoint, f"{mine}/{path}") if path else partial(check_writable, mine)
    trainer: Any = SimpleNamespace(default_root_dir=mine)
    _CheckAllMachines(check, sought).setup(trainer, trainer, "fit")


def test_machines_resume_all_or_none(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
    ranks.run(looked_at, str(tmp_path), "last*.ckpt")
    (tmp_path / "0" / "last.ckpt").touch()
    ranks.run(looked_at, str(tmp_path), "")
    ranks.run(looked_at, str(tmp_path), "hpc_ckpt_*.ckpt")
    with pytest.raises(RuntimeError) as failed:
        ranks.run(looked_at, str(tmp_path), "last*.ckpt")
    assert str(failed.value).count("(rank 0: last.ckpt; rank 1: none): copy them from the machine of rank 0") == 2
    (tmp_path / "1" / "last.ckpt").touch()
    ranks.run(looked_at, str(tmp_path), "last*.ckpt")


def test_a_checkpoint_that_one_machine_lacks_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
    (tmp_path / "0" / "mine.ckpt").write_bytes(b"cut short")
    with pytest.raises(RuntimeError) as failed:
        ranks.run(looked_at, str(tmp_path), "", "mine.ckpt")
    here, there = str(failed.value).split("rank 1:\n")
    assert "mine.ckpt' is no checkpoint" in here
    assert "1/mine.ckpt' does not exist" in there


def test_a_folder_that_one_machine_cannot_write_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    with pytest.raises(RuntimeError) as failed:
        ranks.run(looked_at, str(tmp_path), "")
    assert str(failed.value).count("1' cannot be written") == 2
