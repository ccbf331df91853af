"""The command line: recipes by name, habits of the trainer, and one clear error for every mistake."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes

TINY = [
    "--data.max_classes=20",
    "--data.image_size=12",
    "--data.classes_per_batch=4",
    "--data.samples_per_class=3",
    "--data.batches_per_epoch=2",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))  # glyphs are rendered once
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning turns it off after Ctrl-C


class Interrupts(pl.Callback):
    """Somebody presses Ctrl-C."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class OwnLoss(nn.Module):
    """Fails like a bug of the user's own."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug in OwnLoss")


def never_built() -> nn.Module:
    """A teacher that must not be built."""
    raise AssertionError("the teacher was built")


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(args)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("error: ") == 1, err
    return code, err[err.index("error: ") :]


def config_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["fit", *args, "--print_config"]) == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_help_lists_commands_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["-h"], ["--help"]):
        assert cli.main(args) == 0
        text = capsys.readouterr().out
        for name in ("demo", "fit", "validate", "test", "predict", *recipes.names()):
            assert f"\n  {name} " in text


def test_help_and_version_load_no_heavy_library() -> None:
    code = (
        "import sys; from lightning_rkd.cli.main import main as m; m(['--help']); m(['--version']); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "lightning", "jsonargparse", "matplotlib"} & set(out.split())


def test_unknown_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["dmeo"], capsys) == (2, "error: there is no command 'dmeo'; did you mean demo?\n")


@pytest.mark.parametrize("flag", [["--config", "glyph_rkd"], ["--config=glyph_rkd"], ["-c", "glyph_rkd"]])
def test_unknown_recipe_lists_the_recipes_near_ones_first(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, error = error_of(["fit", *flag], capsys)
    assert code == 2
    assert error.startswith("error: 'glyph_rkd' is neither a file nor a recipe; the recipes are glyphs_rkd, ")
    assert all(name in error for name in recipes.names())


def test_a_file_of_that_path_wins_over_a_recipe(tmp_path: Path) -> None:
    assert recipes.find("glyphs_rkd").parent == recipes.FOLDER
    (tmp_path / "glyphs_rkd").write_text("")
    assert recipes.find("glyphs_rkd") == Path("glyphs_rkd")


def test_defaults_suit_this_library(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(["--model", "DistillationModule", "--model.student", "torch.nn.Identity"], capsys)
    assert config["seed_everything"] == 0
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["checkpoint"]["filename"] == "last"


def test_printing_a_configuration_builds_no_teacher_and_knows_short_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = ["--model.teacher", "Teacher", "--model.teacher.network", "tests.cli.test_main.never_built"]
    args = ["--config", "glyphs_student", *teacher, "--model.loss", "RKDAngle", "--data", "GlyphDataModule"]
    config = config_of(args, capsys)
    assert config["model"]["init_args"]["loss"]["class_path"].endswith("RKDAngle")
    assert config["data"]["class_path"].endswith("GlyphDataModule")
    assert config["model"]["init_args"]["teacher"]["init_args"]["network"]["class_path"].endswith("never_built")


@pytest.mark.slow
def test_what_is_printed_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(["--config", "glyphs_student", *TINY, "--trainer.default_root_dir=mine"], capsys)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", "mine.yaml"]) == 0
    assert (tmp_path / "mine" / "last.ckpt").is_file()


@pytest.mark.slow
def test_one_option_moves_checkpoints_and_configuration(tmp_path: Path) -> None:
    run = ["fit", "--config", "glyphs_student", *TINY, "--trainer.default_root_dir", "elsewhere"]
    assert cli.main(run) == 0
    assert cli.main(run) == 0, "a second run replaces the first"
    assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {"config.yaml", "last.ckpt"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "written"),
    [
        ("--trainer.enable_checkpointing=false", {"config.yaml"}),
        ('--trainer.callbacks={"class_path": "ModelCheckpoint", "init_args": {"filename": "mine"}}', {"checkpoints"}),
    ],
)
def test_the_checkpoint_group_steps_aside(option: str, written: set[str], tmp_path: Path) -> None:
    assert cli.main(["fit", "--config", "glyphs_student", *TINY, option]) == 0
    assert {p.name for p in (tmp_path / "runs" / "glyphs_student").iterdir()} == {"config.yaml", *written}


@pytest.mark.slow
def test_with_a_monitor_best_and_last_are_kept_apart(tmp_path: Path) -> None:
    monitor = ["--checkpoint.monitor", "val/recall_at_1", "--checkpoint.mode", "max"]
    assert cli.main(["fit", "--config", "glyphs_student", *TINY, *monitor]) == 0
    assert {p.name for p in (tmp_path / "runs" / "glyphs_student").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


def test_unknown_key_in_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (recipes.FOLDER / "glyphs_student.yaml").read_text().replace("task_loss:", "tusk_loss:")
    (tmp_path / "mine.yaml").write_text(text)
    code, error = error_of(["fit", "--config", "mine.yaml"], capsys)
    assert code == 2
    assert "tusk_loss" in error


def test_broken_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("model: [")
    code, error = error_of(["fit", "--config", "mine.yaml"], capsys)
    assert code == 2
    assert "Problems parsing config" in error


def test_an_output_folder_that_is_not_writable_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = ["--trainer.default_root_dir", "file/run"]
    code, error = error_of(["fit", "--config", "glyphs_student", *TINY, *folder], capsys)
    assert code == 1
    assert error.startswith("error: the output folder 'file/run' cannot be written: ")


def test_missing_teacher_weights_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = error_of(["fit", "--config", "glyphs_rkd", *TINY], capsys)
    assert code == 1
    assert error.startswith("error: the weights file 'runs/glyphs_teacher/last.ckpt' does not exist; train")


@pytest.mark.slow
def test_damaged_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--config", "glyphs_student", *TINY]
    assert cli.main(["fit", *run]) == 0
    capsys.readouterr()
    sound = (tmp_path / "runs" / "glyphs_student" / "last.ckpt").read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 4
    for name, content in {"flipped": bytes(flipped), "short": sound[:-100], "text": b"no checkpoint"}.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        for command in (["test"], ["fit"]):
            code, error = error_of([*command, *run, "--ckpt_path", str(path)], capsys)
            assert code == 1
            assert str(path) in error
    code, error = error_of(["test", *run, "--ckpt_path", "absent.ckpt"], capsys)
    assert (code, error.splitlines()[0]) == (1, "error: the checkpoint 'absent.ckpt' does not exist")


@pytest.mark.slow
def test_a_checkpoint_does_not_replace_the_configuration(tmp_path: Path) -> None:
    run = ["--config", "glyphs_student", *TINY]
    assert cli.main(["fit", *run]) == 0
    ckpt = ["--ckpt_path", "runs/glyphs_student/last.ckpt", "--trainer.default_root_dir", "tested"]
    assert cli.main(["test", *run, *ckpt, "--model.metrics.retrieval.init_args.k=[1,3]"]) == 0
    config = yaml.safe_load((tmp_path / "tested" / "config.yaml").read_text())
    assert config["model"]["init_args"]["metrics"]["retrieval"]["init_args"]["k"] == [1, 3]


@pytest.mark.slow
def test_errors_elsewhere_are_one_line_unless_the_traceback_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", "glyphs_student", *TINY, "--model.task_loss", "tests.cli.test_main.OwnLoss"]
    code, error = error_of(args, capsys)
    assert code == 1
    assert error.splitlines()[0] == "error: RuntimeError: a bug in OwnLoss"
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(RuntimeError, match="a bug in OwnLoss"):
        cli.main(args)


def test_ctrl_c_ends_with_130() -> None:
    args = ["fit", "--config", "glyphs_student", *TINY, "--trainer.callbacks", "tests.cli.test_main.Interrupts"]
    assert cli.main(args) == 130
