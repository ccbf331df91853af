"""``lightning-rkd export``, run for real on a run of a few steps."""

import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import run
from lightning_rkd.cli.experiments.settings import with_settings, with_steps
from lightning_rkd.export import load


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, as compare leaves it."""
    folder = tmp_path_factory.mktemp("run")
    config = yaml.safe_load((recipes.FOLDER / "glyphs_student.yaml").read_text())
    settings = {
        "data.init_args.max_classes": 12,
        "data.init_args.image_size": 12,
        "data.init_args.classes_per_batch": 4,
        "trainer.accelerator": "cpu",
    }
    run(with_settings(with_steps(config, 2), settings), folder, 0, None, about={"date": "2026-01-02"})
    return folder


def test_a_run_becomes_files_that_give_its_students_numbers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert cli.main(["export", str(trained), "--out", str(out)]) == 0
    assert "student.onnx differs from the student by at most" in capsys.readouterr().out
    state = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    student = load(out)
    for name, x in student.state_dict().items():
        assert torch.equal(x, state[f"student.{name}"]), name
    x = torch.rand(3, 1, 12, 12)
    session = onnxruntime.InferenceSession(out / "student.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(found, student(x).detach(), rtol=1e-4, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "GlyphDataModule" in card
    assert "- teacher: none" in card
    assert "TripletMarginLoss" in card
    assert "2026-01-02" in card
    assert "| recall_at_1 |" in card
    assert "pixels from 0 to 1, minus the mean" in card


def test_a_fit_is_exported_by_its_folder_and_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With short names of classes, which Lightning's loggers get told in full."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))  # glyphs are rendered once
    sizes = {
        "max_classes": 12,
        "image_size": 12,
        "classes_per_batch": 4,
        "samples_per_class": 3,
        "batches_per_epoch": 2,
    }
    student = {"class_path": "ConvNet", "init_args": {"widths": [4], "embedding_dim": 8}}
    task = {"class_path": "pytorch_metric_learning.losses.TripletMarginLoss"}
    mine = {
        "model": {"class_path": "DistillationModule", "init_args": {"student": student, "task_loss": task}},
        "data": {"class_path": "GlyphDataModule", "init_args": sizes},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": "run",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
    }
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    assert cli.main(["fit", "--config", "mine.yaml"]) == 0
    formats = ["--formats", "safetensors"]
    assert cli.main(["export", "run", "--out", "by_folder", *formats]) == 0
    named = ["--config", "mine.yaml", "--ckpt_path", "run/last.ckpt"]
    assert cli.main(["export", *named, "--out", "by_files", *formats]) == 0
    x = torch.rand(3, 1, 12, 12)
    assert torch.equal(load("by_folder")(x), load("by_files")(x))

    state = torch.load("run/last.ckpt", weights_only=True)
    state["state_dict"] = {name.replace("student.", "student._orig_mod."): w for name, w in state["state_dict"].items()}
    torch.save(state, "compiled.ckpt")
    named[-1] = "compiled.ckpt"
    assert cli.main(["export", *named, "--out", "compiled", *formats]) == 0
    assert torch.equal(load("compiled")(x), load("by_files")(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "last.ckpt").unlink(), "there is no checkpoint"),
        (lambda run: (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:-99]), "damaged or cut short"),
        (lambda run: (run / "config.yaml").write_text("model: {}"), "no model.init_args.student"),
        (
            lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("- 16", "- 17")),
            "does not fit the configuration's student",
        ),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text().replace("max_classes: 12", "max_classes: -1")
            ),
            "--input 3,32,32",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    change, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    change(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--formats", "safetensors"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_are_told_of_the_weights_they_were_measured_with_only(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    state["state_dict"] = {name: torch.zeros_like(x) for name, x in state["state_dict"].items()}
    torch.save(state, tmp_path / "run" / "early.ckpt")
    command = ["export", str(tmp_path / "run"), "--formats", "safetensors"]
    early = ["--ckpt_path", str(tmp_path / "run" / "early.ckpt"), "--out", str(tmp_path / "early")]
    assert cli.main([*command, *early]) == 0
    assert "scores: not measured" in (tmp_path / "early" / "README.md").read_text()
    assert cli.main([*command, "--out", str(tmp_path / "last")]) == 0
    assert "| recall_at_1 |" in (tmp_path / "last" / "README.md").read_text()


def test_without_its_data_a_run_is_exported_by_the_shape_that_is_given(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["data"] = {"class_path": "ImageFolderDataModule", "init_args": {"root": "gone"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--formats", "safetensors"]
    assert cli.main(command) == 1
    assert cli.main([*command, "--input", "1,x"]) == 2
    assert cli.main([*command, "--input", "1,12,12"]) == 0
    assert load(tmp_path / "out")(torch.zeros(2, 1, 12, 12)).shape == (2, 32)
