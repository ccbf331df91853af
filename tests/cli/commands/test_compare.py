"""``lightning-rkd compare``, run for real on few letters."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_rkd.cli import main as cli
from lightning_rkd.cli.experiments import plan, tuning
from lightning_rkd.cli.experiments.tasks import tasks_of
from lightning_rkd.cli.experiments.work import work
from lightning_rkd.data import GlyphDataModule

TINY = {
    "data.init_args.max_classes": 12,
    "data.init_args.image_size": 12,
    "data.init_args.classes_per_batch": 4,
    "data.init_args.eval_batch_size": 64,
    "trainer.accelerator": "cpu",
}
FILE: dict[str, Any] = {
    "title": "Few letters",
    "recipe": "glyphs_rkd",
    "set": TINY,
    "steps": 4,
    "teacher": {"recipe": "glyphs_teacher", "seed": 0},
    "seeds": [0, 1],
    "baseline": "alone",
    "networks": {"alone": {"loss": None}, "RKD-D": {"loss": "RKDDistance", "weight": 1}},
    "scores": ["recall_at_1"],
    "select": "map_at_r",
}
PROGRAM = [sys.executable, "-c", "import sys; from lightning_rkd.cli.main import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def written(**changes: Any) -> str:
    Path("mine.yaml").write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
    return "mine.yaml"


def start(out: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PROGRAM, "compare", "--config", written(), "--out", out, "--jobs", "2"])


def runs(out: str) -> list[dict[str, str]]:
    with (Path(out) / "runs.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_killed_at_any_time_and_started_again_it_gives_the_table_of_an_unbroken_run() -> None:
    assert start("whole").wait(300) == 0
    for seconds in (8.0, 11.0):
        killed = start("killed")
        time.sleep(seconds)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert start("killed").wait(300) == 0
    assert runs("killed") == runs("whole")
    assert len(runs("whole")) == 5
    before = os.stat("whole/rkd-d-1/last.ckpt").st_mtime_ns
    assert start("whole").wait(300) == 0
    assert os.stat("whole/rkd-d-1/last.ckpt").st_mtime_ns == before
    table = Path("whole/table.md").read_text()
    assert "| alone |" in table
    assert "seeds: 0, 1" in table
    assert Path("whole/plot.png").stat().st_size > 1000
    checkpoint = torch.load("whole/rkd-d-0/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])


@pytest.mark.slow
def test_a_tuned_comparison_with_cache_generations_and_a_run_that_fails_keeps_all_that_was_finished(capsys) -> None:
    never = {"model.init_args.lr_scheduler.init_args.max_lr": 1e30}
    changes = {
        "set": {**TINY, "data.init_args.views": 2},
        "cache": True,
        "seeds": [0],
        "networks": {**FILE["networks"], "next": {"generations": 2}, "broken": {"loss": "RKDDistance", "set": never}},
    }
    command = ["compare", "--config", written(**changes), "--out", "out", "--tune", "RKD-D.weight=0.5,1"]
    assert cli.main(command) == 1
    assert "FAILED: broken, seed 0" in capsys.readouterr().out
    found = {row["network"]: row for row in runs("out")}
    assert list(found) == ["teacher", "alone", "RKD-D", "next 1", "next 2", "broken"]
    assert [name for name, row in found.items() if row["error"]] == ["broken"]
    assert len(list(Path("out/cache").iterdir())) == 1  # one for all that the teacher teaches, trials included

    with Path("out/tune.csv").open() as file:
        tried = list(csv.DictReader(file))
    best = max(tried, key=lambda row: float(row["map_at_r"]))
    assert [row["chosen"] for row in tried].count("chosen") == 1
    assert best["chosen"] == "chosen"
    config = yaml.safe_load(Path("out/rkd-d-0/config.yaml").read_text())
    assert best["values"] == f"weight={config['model']['init_args']['weight']}"

    taught = yaml.safe_load(Path("out/next-2-0/config.yaml").read_text())["model"]["init_args"]["teacher"]
    assert taught["init_args"]["weights"] == str(Path("out/next-1-0/last.ckpt"))
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/result.pt")}
    assert cli.main(command) == 1
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*/result.pt")} == before


def test_what_is_tuned_is_measured_without_a_look_at_the_test_data(monkeypatch) -> None:
    def forbidden(self: Any) -> Any:
        raise AssertionError("the test data were read")

    monkeypatch.setattr(GlyphDataModule, "test_dataloader", forbidden)
    changes = {"teacher": None, "recipe": "glyphs_student", "networks": {"alone": {"loss": None}}}
    comparison = plan.read(Path(written(**changes)))
    trials = tuning.trials(
        tuning.parse(["alone.model.init_args.optimizer.init_args.lr=0.01,0.02"], comparison), comparison
    )
    assert [trial.values for trial in trials] == [{"model.init_args.optimizer.init_args.lr": lr} for lr in (0.01, 0.02)]
    for trial in trials:
        work(trial.task.message(Path("out"), None, ""), lambda message: None)
    assert sorted(path.parent.name for path in Path("out/tune/alone").glob("*/result.pt")) == sorted(
        Path(trial.task.folder).name for trial in trials
    )
    with pytest.raises(AssertionError, match="the test data were read"):
        work(tasks_of(comparison, comparison.networks, [0])[0].message(Path("out"), None, ""), lambda message: None)


def test_settings_of_the_command_hold_for_the_teacher_too_but_for_its_model() -> None:
    settings = {"data.init_args.max_classes": 7, "model.init_args.weight": 3}
    comparison = plan.read(Path(written()), settings=settings)
    assert comparison.teacher is not None
    assert comparison.teacher.config["data"]["init_args"]["max_classes"] == 7
    assert "weight" not in comparison.teacher.config["model"]["init_args"]
    assert all(n.config["data"]["init_args"]["max_classes"] == 7 for n in comparison.networks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": {"alone": {"loss": None}, "a": {"loss": "RKDDistnce"}}}, "a: there is no loss 'RKDDistnce'"),
        ({"networks": {"alone": {"los": None}}}, "there is no key 'los'"),
        ({"title": "x", "seed": [1]}, "there is no key 'seed'"),
        ({"baseline": "nobody"}, "baseline: there is no network 'nobody'"),
        ({"seeds": [0, 0]}, "seeds: expected a number of seeds"),
        ({"teacher": None, "recipe": "glyphs_student"}, "needs a teacher"),
        ({"recipe": "glyphs_rdk"}, "glyphs_rdk"),
        ({"networks": {"alone": {"loss": None}, "teacher": {"loss": None}}}, "the name of the teacher's own row"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(changes, message, capsys) -> None:
    assert cli.main(["compare", "--config", written(**changes), "--out", "out"]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(Path().glob("out/*/last.ckpt"))


def test_a_network_that_is_named_twice_is_refused(capsys) -> None:
    text = Path(written()).read_text().replace("RKD-D:", "alone:")
    Path("mine.yaml").write_text(text)
    assert cli.main(["compare", "--config", "mine.yaml", "--out", "out"]) in (1, 2)
    assert "'alone' is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("name", plan.names())
def test_comparisons_that_come_with_the_package_describe_what_can_be_built(name) -> None:
    comparison = plan.read(plan.find(name))
    plan.check(comparison.networks)
    assert comparison.baseline in [network.name for network in comparison.networks]
