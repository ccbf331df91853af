"""Training through the command line when things go wrong: the last checkpoint is whole, the error clear, no exit 0."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_rkd.cli import main as cli
from lightning_rkd.cli.trainer import WholeCheckpointIO, _RowsPerRank
from lightning_rkd.data import PKBatchSampler
from tests.harness import toys
from tests.harness.platforms import LOOPBACK
from tests.harness.processes import GLYPHS, run_script

resource: Any = pytest.importorskip("resource", reason="needs POSIX limits on the size of files")

TINY = [*GLYPHS, "--data.batches_per_epoch=3", "--trainer.max_epochs=4", "--trainer.default_root_dir=run"]
FIT = ["fit", "--config", "glyphs_student", *TINY]


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def with_callback(name: str, *options: str) -> list[str]:
    return [*FIT, "--trainer.callbacks+", json.dumps({"class_path": f"tests.cli.test_trainer.{name}"}), *options]


def kept(path: str = "run/last.ckpt") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


class AtStep(pl.Callback):
    """Does something in the second step of the third epoch."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            self.act(trainer, batch)

    def act(self, trainer: pl.Trainer, batch: Any) -> None:
        raise NotImplementedError


class FillsTheDisk(AtStep):
    def act(self, trainer: pl.Trainer, batch: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class SpoilsInputs(AtStep):
    def act(self, trainer: pl.Trainer, batch: Any) -> None:
        batch[0][2:].fill_(torch.nan)


class SpoilsTheTeacher(AtStep):
    def act(self, trainer: pl.Trainer, batch: Any) -> None:
        next(trainer.lightning_module.distiller.teacher.network.parameters()).data.fill_(torch.nan)  # type: ignore


class Terminates(AtStep):
    def act(self, trainer: pl.Trainer, batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


WHOLE: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
"""Weights after runs without a fault, by their options."""


def resumes_to_the_same_weights(*options: str) -> bool:
    assert cli.main([*FIT, *options, "--ckpt_path", "last"]) == 0
    if options not in WHOLE:
        assert cli.main([*FIT, *options, "--trainer.default_root_dir=whole"]) == 0
        WHOLE[options] = kept("whole/last.ckpt")["state_dict"]
    state, whole = kept()["state_dict"], WHOLE[options]
    return kept()["global_step"] == 12 and all(torch.equal(state[key], whole[key]) for key in whole)


def run_command(args: list[str], first: str = "") -> tuple[int | None, str]:
    """Exit code and output of the command in a process of its own, in which ``first`` is run before."""
    start = "import sys\nfrom lightning_rkd.cli.main import main"
    Path("command.py").write_text(f"{first}\n{start}\nsys.exit(main({args!r}))\n")
    return run_script(Path("command.py").absolute())


@pytest.mark.slow
def test_a_full_disk_ends_training_with_the_checkpoint_before_it_whole(capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert cli.main(with_callback("FillsTheDisk")) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "run/last.ckpt' could not be written, and is what it was before: File too large" in capsys.readouterr().err
    assert kept()["global_step"] == 6
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml", "last.ckpt"}, "no half of a file"
    assert resumes_to_the_same_weights()


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["student", "teacher", "no teacher"])
def test_nan_in_the_middle_of_an_epoch_ends_training_and_it_resumes(
    spoilt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs that are NaN, for a student with and without a teacher, and a teacher that is NaN."""
    options = []
    if spoilt != "no teacher":
        teacher = {"class_path": "Teacher", "init_args": {"network": {"class_path": "ConvNet"}}}
        model = {"class_path": "DistillationModule", "init_args": {"teacher": teacher, "loss": {"class_path": "RKD"}}}
        Path("taught.yaml").write_text(yaml.safe_dump({"model": model}))
        options = ["--config=taught.yaml"]
    assert cli.main(with_callback("SpoilsTheTeacher" if spoilt == "teacher" else "SpoilsInputs", *options)) == 1
    error = capsys.readouterr().err
    found = "train/task is NaN or infinite: check the batch"
    if spoilt != "no teacher":
        found = f".*the {spoilt}'s output holds NaN or infinity, first in row 0"  # a norm spreads it
    assert re.search(f"error: step 7: {found}", error), error
    assert kept()["global_step"] == 6
    assert resumes_to_the_same_weights(*options)


@pytest.mark.slow
def test_sigterm_ends_training_with_143_and_it_resumes_bit_for_bit() -> None:
    code, output = run_command(with_callback("Terminates"))
    assert code == 143, output
    assert output.endswith("terminated\n(the same command with --ckpt_path last resumes from the last checkpoint)\n")
    assert "Traceback" not in output
    assert kept()["global_step"] == 6
    assert resumes_to_the_same_weights()


DIES_IN_A_WRITE = """
import os, signal
from lightning_rkd.utils import files
from lightning_rkd.cli import trainer as training
writes = []
def dies(path, content):
    writes.append(path)
    if len(writes) == 3:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    whole(path, content)
whole, training.write_whole = files.write_whole, dies
"""


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_keeps_the_one_before() -> None:
    code, output = run_command(FIT, first=DIES_IN_A_WRITE)
    assert code == -signal.SIGKILL, output
    assert kept()["global_step"] == 6
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml", "last.ckpt", ".last.ckpt.part"}
    assert resumes_to_the_same_weights()
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml", "last.ckpt"}


def test_an_interrupted_write_of_a_configuration_keeps_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import ArgumentParser

    def half(self: Any, config: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_text("model: [")
        raise KeyboardInterrupt

    Path("run").mkdir()
    Path("run/config.yaml").write_text("whole")
    monkeypatch.setattr(ArgumentParser, "save", half)
    assert cli.main(FIT) == 130
    assert Path("run/config.yaml").read_text() == "whole"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning turns it off after Ctrl-C


def test_damage_is_found_whichever_way_a_checkpoint_is_chosen(tmp_path: Path) -> None:
    """``best``, ``last`` and ``hpc`` are looked up by Lightning, later than the command line can check a path."""
    trainer = toys.trainer(plugins=[WholeCheckpointIO()])
    trainer.fit(toys.Student(), toys.loader())
    path = tmp_path / "folder" / "x.ckpt"
    trainer.save_checkpoint(path)
    content = bytearray(path.read_bytes())
    assert trainer.strategy.load_checkpoint(path)["global_step"] == toys.STEPS
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt' is damaged"):
        toys.trainer(plugins=[WholeCheckpointIO()], max_epochs=2).fit(toys.Student(), toys.loader(), ckpt_path=path)


# Own data on two devices


class OwnGlyphs(pl.LightningDataModule):
    """A data module that knows nothing of devices."""

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = torch.randn(24, 1, 12, 12), torch.arange(24) // 3
        return DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)


def test_rows_that_nobody_deals_out_are_refused_on_two_devices_only() -> None:
    rows = TensorDataset(torch.zeros(8, 1))
    plain, ours = DataLoader(rows, shuffle=True), DataLoader(rows, batch_sampler=PKBatchSampler([0, 0, 1, 1] * 2, 2, 2))
    dealt = DataLoader(rows, sampler=DistributedSampler(rows, num_replicas=2, rank=0))

    def look(loader: Any, devices: int = 2, lightnings: bool = False) -> None:
        connector = SimpleNamespace(use_distributed_sampler=lightnings, is_distributed=devices > 1)
        trainer: Any = SimpleNamespace(
            world_size=devices, train_dataloader=loader, _accelerator_connector=connector, max_epochs=1
        )
        _RowsPerRank().on_train_start(trainer, trainer)

    for loader in (plain, DataLoader(rows), [ours, plain]):
        with pytest.raises(ValueError, match=r"all 2 devices would train on the same rows.*sampler=true"):
            look(loader)
        look(loader, devices=1)
        look(loader, lightnings=True)
    look(ours)
    look([dealt, ours])


@pytest.mark.slow
def test_own_data_on_two_devices_needs_lightnings_sampler() -> None:
    options = [option for option in TINY if not option.startswith("--data.")]
    fit = ["fit", "--config", "glyphs_student", "--data", "tests.cli.test_trainer.OwnGlyphs", *options]
    fit += ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    local = f"import os; os.environ.update({LOOPBACK!r})"
    code, output = run_command(fit, local)
    assert code == 1, output
    assert "all 2 devices would train on the same rows" in output
    code, output = run_command([*fit, "--trainer.use_distributed_sampler=true"], local)
    assert code == 0, output
    assert kept()["global_step"] == 4 * 2
