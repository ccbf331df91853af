"""The command line: recipes by name, habits of the trainer, and one clear error for every mistake."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from tests.harness.processes import GLYPHS

TINY = [*GLYPHS, "--data.batches_per_epoch=2", "--trainer.max_epochs=1"]


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


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: lightning-rkd {command}" in text
    assert "--out" in text
    assert "%%" not in text


def test_help_and_version_load_no_heavy_library() -> None:
    code = (
        "import sys; from lightning_rkd.cli.main import main as m; m(['--help']); m(['--version']); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "lightning", "jsonargparse", "matplotlib"} & set(out.split())


def test_unknown_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["dmeo"], capsys) == (2, "error: there is no command 'dmeo'; did you mean demo?\n")


@pytest.mark.parametrize("option", [["--model.loss", "RKDDistanc"], ["--model.loss.class_path=RKDDistanc"]])
def test_an_unknown_loss_is_answered_with_the_near_one(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: model.loss: there is no class 'RKDDistanc'; did you mean 'RKDDistance'?\n"
    assert error_of(["fit", "--config", "glyphs_rkd", *option], capsys) == (2, message)


def test_an_unknown_class_in_a_file_is_answered_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = (recipes.FOLDER / "glyphs_rkd.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("GlyphDataModule", "GlyphsDataModule"))
    message = "error: data: there is no class 'GlyphsDataModule'; did you mean 'GlyphDataModule'?\n"
    assert error_of(["fit", "--config", "mine.yaml"], capsys) == (2, message)


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """``--trainer.max_step`` was taken for ``--trainer.max_steps``."""
    for option in ("--trainer.max_step=3", "--seed_every=3"):
        code, error = error_of(["fit", "--config", "glyphs_student", option], capsys)
        assert code == 2
        assert option in error


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
@pytest.mark.parametrize(
    ("options", "written"),
    [
        ([], {"last.ckpt"}),
        (["--trainer.enable_checkpointing=false"], set()),
        (['--trainer.callbacks={"class_path": "ModelCheckpoint"}'], {"checkpoints"}),
        (["--checkpoint.monitor=val/recall_at_1", "--trainer.limit_val_batches=1.0"], {"best.ckpt", "last.ckpt"}),
    ],
)
def test_one_folder_holds_the_configuration_and_the_checkpoints(options: list[str], written: set[str]) -> None:
    run = ["fit", "--config", "glyphs_student", *TINY, "--trainer.default_root_dir=elsewhere", *options]
    for _ in range(1 if options else 2):  # a second run replaces the first
        assert cli.main(run) == 0
    assert {path.name for path in Path("elsewhere").iterdir()} == {"config.yaml", *written}
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--config=mine.yaml"], 2, "tusk_loss"),
        (["--config=broken.yaml"], 2, "Problems parsing config"),
        (
            ["--config=glyphs_student", "--trainer.default_root_dir=mine.yaml/run"],
            1,
            "error: the output folder 'mine.yaml/run' cannot be written: ",
        ),
        (
            ["--config=glyphs_rkd", "--model.micro_batch=0"],
            1,
            "error: micro_batch must be an integer of at least 1, got",
        ),
        (["--config=glyphs_rkd"], 1, "error: the weights file 'runs/glyphs_teacher/last.ckpt' does not exist; train"),
    ],
)
def test_a_mistake_in_a_file_or_a_folder_is_named_before_training(
    args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (recipes.FOLDER / "glyphs_student.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("task_loss:", "tusk_loss:"))
    Path("broken.yaml").write_text("model: [")
    found, error = error_of(["fit", *args, *TINY], capsys)
    assert found == code
    assert message in error


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
