"""``lightning-rkd compare``, on few glyphs."""

import csv
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.commands import compare as command
from lightning_rkd.cli.commands import demo
from lightning_rkd.cli.experiments import plan, tasks, tuning, workers
from lightning_rkd.cli.experiments.tasks import tasks_of
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.losses.base import RelationalLoss
from tests.harness import replicas
from tests.harness.forks import FORKS
from tests.harness.platforms import posix_only

TINY = {
    "data.init_args.max_classes": 12,
    "data.init_args.image_size": 12,
    "data.init_args.classes_per_batch": 4,
    "data.init_args.eval_batch_size": 64,
    "trainer.accelerator": "cpu",
}
FILE: dict[str, Any] = {
    "title": "Few glyphs",
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


def written(**changes: Any) -> str:
    Path("mine.yaml").write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
    return "mine.yaml"


def runs(out: str) -> list[dict[str, str]]:
    with (Path(out) / "runs.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


class Dies(RelationalLoss):
    """Kills its process, as a system that runs out of memory does."""

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return student.mean()


@pytest.mark.parametrize("module", [demo, command], ids=["demo", "compare"])
def test_damaged_images_are_left_out_if_asked(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(module, "compare", compare)
    photos = replicas.photos(tmp_path / "photos", images=6, size=16)
    (photos / "group0" / "class0" / "0.png").write_bytes(b"no image at all")
    folder = {"data": {"class_path": "ImageFolderDataModule", "init_args": {"root": str(photos)}}}
    written(set={"trainer.accelerator": "cpu", **folder}, teacher={"recipe": "glyphs_teacher"})
    args = ["demo", f"--data={photos}", "--seeds=1"] if module is demo else ["compare", "--config=mine.yaml"]
    if module is demo:
        assert cli.main(args) == 1
        assert "leave out all damaged images with skip_damaged=True (--skip-damaged)" in capsys.readouterr().err
    assert cli.main([*args, "--skip-damaged"]) == 130
    comparison = compare.call_args.args[0]
    every = [comparison.teacher, *comparison.networks]
    assert [network.config["data"]["init_args"]["skip_damaged"] for network in every] == [True] * 3
    written()
    assert cli.main(["compare", "--config", "mine.yaml", "--skip-damaged"]) == 1
    assert "'skip_damaged' is not accepted" in capsys.readouterr().err


@posix_only
@pytest.mark.slow
def test_failed_runs_are_named_and_finished_ones_are_kept(capsys, monkeypatch) -> None:
    """With tuning, a cache and generations; one run fails, and the process of another one dies."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: FORKS)  # which have imported Lightning
    never = {"model.init_args.lr_scheduler.init_args.max_lr": 1e30}
    changes = {
        "set": {**TINY, "data.init_args.views": 2},
        "cache": True,
        "seeds": [0],
        "networks": {
            **FILE["networks"],
            "next": {"generations": 2},
            "broken": {"loss": "RKDDistance", "set": never},
            "dies": {"loss": "tests.cli.commands.test_compare.Dies"},
        },
    }
    command = ["compare", "--config", written(**changes), "--out", "out", "--tune", "RKD-D.weight=0.5,1"]
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "FAILED: broken, seed 0" in said
    assert "the last lines of out/broken-0/log.txt" in said
    assert "FAILED: dies, seed 0: its process was killed, or ran out of memory" in said
    found = {row["network"]: row for row in runs("out")}
    assert list(found) == ["teacher", "alone", "RKD-D", "next 1", "next 2", "broken", "dies"]
    assert [name for name, row in found.items() if row["error"]] == ["broken", "dies"]
    assert len(list(Path("out/cache").iterdir())) == 1  # one for all students of the teacher, trials included

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


def test_tuning_does_not_read_the_test_data(monkeypatch) -> None:
    def forbidden(self: Any) -> Any:
        raise AssertionError("the test data were read")

    monkeypatch.setattr(GlyphDataModule, "test_dataloader", forbidden)
    monkeypatch.setattr(tasks, "report", lambda *progress: None)
    changes = {"teacher": None, "recipe": "glyphs_student", "networks": {"alone": {"loss": None}}}
    comparison = plan.read(Path(written(**changes)))
    trials = tuning.plan_trials(["alone.model.init_args.optimizer.init_args.lr=0.01,0.02"], comparison)
    assert [trial.values for trial in trials] == [{"model.init_args.optimizer.init_args.lr": lr} for lr in (0.01, 0.02)]
    for trial in trials:
        trial.task.perform(Path("out"), None, "")
    assert sorted(path.parent.name for path in Path("out/tune/alone").glob("*/result.pt")) == sorted(
        Path(trial.task.folder).name for trial in trials
    )
    with pytest.raises(AssertionError, match="the test data were read"):
        tasks_of(comparison, comparison.networks, [0])[0].perform(Path("out"), None, "")


def test_the_teacher_takes_the_commands_settings_except_the_models() -> None:
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
def test_an_invalid_comparison_is_an_error_before_training(changes, message, capsys) -> None:
    assert cli.main(["compare", "--config", written(**changes), "--out", "out"]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(Path().glob("out/*/last.ckpt"))


def test_a_network_that_is_named_twice_is_refused(capsys) -> None:
    text = Path(written()).read_text().replace("RKD-D:", "alone:")
    Path("mine.yaml").write_text(text)
    assert cli.main(["compare", "--config", "mine.yaml", "--out", "out"]) in (1, 2)
    assert "'alone' is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes.names("comparison"))
def test_every_network_of_the_packages_comparisons_can_be_built(name) -> None:
    comparison = plan.read(recipes.find(name, "comparison"))
    plan.check(comparison.networks)
    assert comparison.baseline in [network.name for network in comparison.networks]
