"""The demo on miniature settings: what it leaves, what it refuses, and that an interrupted one goes on."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.commands import demo, options
from lightning_rkd.cli.experiments import runs as study
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.models.small import ConvNet
from tests.harness.processes import end_of, start

LEFT = {"report.html", "table.md", "table.csv", "runs.csv", "demo.yaml", "neighbours.png", "relations.png", "teacher"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # processes that share few cores
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning turns it off after Ctrl-C


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight classes of six colour images, in two folders of folders."""
    rng = np.random.default_rng(0)
    for c in range(8):
        folder = tmp_path / "photos" / f"group{c % 2}" / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.clip(rng.normal(30 * c, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would be the first thing to be noticed."""
    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("it trained"))


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["demo", *args]) in (1, 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.mark.slow
def test_the_demo_leaves_a_table_pictures_networks_and_configurations(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["demo", "--data", str(photos), "--steps", "2", "--seeds", "0,4", "--out", "out/demo"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    for said in ("48 images of 8 classes", "recall_at_1", "map_at_r", "distance_correlation", "In out/demo there are"):
        assert said in text
    out = Path("out/demo")
    names = {"alone-0", "alone-4", "rkd-0", "rkd-4"}
    assert {path.name for path in out.iterdir()} == LEFT | names
    assert {path.name for path in Path("out").iterdir()} == {"demo"}, "no temporary folder stays"
    table = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == [demo.TEACHER, demo.ALONE, demo.DISTILLED]
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 5
    for name in ("neighbours.png", "relations.png"):
        with Image.open(out / name) as picture:
            assert 1100 <= picture.width <= 1300
    for name in ("teacher", *names):
        assert {path.name for path in (out / name).iterdir()} == {"config.yaml", "last.ckpt", study.RESULT}

    fit = ["fit", "--config", "out/demo/rkd-4/config.yaml", "--trainer.enable_progress_bar=false"]
    assert cli.main([*fit, "--trainer.default_root_dir=again"]) == 0, "a configuration it left can be run"


def test_the_student_has_at_most_a_tenth_of_the_teachers_parameters() -> None:
    def network(name: str) -> ConvNet:
        config = yaml.safe_load((recipes.FOLDER / f"glyphs_{name}.yaml").read_text())
        arguments: dict[str, Any] = config["model"]["init_args"]["student"]["init_args"]
        return ConvNet(**arguments)

    assert count_parameters(network("rkd")) <= count_parameters(network("teacher")) / 10


def test_the_plan_suits_the_images(photos: Path) -> None:
    plan = demo._folder_plan(photos, demo.Console(quiet=True))
    data = plan.distilled["data"]["init_args"]
    assert (data["image_size"], data["root"]) == (16, str(photos))
    networks = [plan.teacher["model"]["init_args"]["student"]["init_args"]]
    networks.append(plan.distilled["model"]["init_args"]["teacher"]["init_args"]["network"]["init_args"])
    assert networks[0] == networks[1]
    students = [c["model"]["init_args"]["student"]["init_args"] for c in (plan.alone, plan.distilled)]
    assert students[0] == students[1]
    assert networks[0]["in_channels"] == students[0]["in_channels"] == 3
    assert count_parameters(ConvNet(**students[0])) <= count_parameters(ConvNet(**networks[0])) / 10


STOP = """
import os, signal
from lightning_rkd.cli.commands import demo
advance = demo._Bar.on_train_batch_end
def stop(self, trainer, *args, **kwargs):
    if self.name == "student alone, seed 0" and trainer.global_step == 75:
        os.kill(os.getpid(), signal.SIGTERM)
    advance(self, trainer, *args, **kwargs)
demo._Bar.on_train_batch_end = stop
"""


def scores(out: str) -> list[list[str]]:
    """Every run, without the seconds it took."""
    with Path(out, "runs.csv").open(newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


@pytest.mark.slow
def test_a_demo_that_is_stopped_goes_on_to_the_table_of_one_that_is_not(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the second epoch of a student; then the same command, twice."""
    args = ["demo", "--data", str(photos), "--steps", "100", "--seeds", "1", "--out", "new/stopped"]
    code, output = end_of(start(*args, first=STOP))
    assert code == 143, output
    assert f"Stopped. The same command goes on from here: lightning-rkd {' '.join(args)}" in output
    assert "Traceback" not in output
    left = Path("new/stopped")
    assert {path.name for path in left.iterdir()} == {demo.MADE_BY, "teacher", "alone-0"}
    assert (left / "teacher" / study.RESULT).exists()
    assert not (left / "alone-0" / study.RESULT).exists()

    teacher = (left / "teacher" / "last.ckpt").stat().st_mtime_ns
    # processes of their own: what other tests did to this one may show in the last digit
    code, said = end_of(start(*args))
    assert code == 0, said
    assert "Going on with what new/stopped holds." in said
    assert "student alone, seed 0: goes on after 50 steps" in said
    assert (left / "teacher" / "last.ckpt").stat().st_mtime_ns == teacher, "not trained again"
    assert end_of(start(*args[:-1], "whole"))[0] == 0
    assert scores("new/stopped") == scores("whole")
    assert (left / "neighbours.png").read_bytes() == Path("whole/neighbours.png").read_bytes()

    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    tables = {path: path.read_bytes() for path in left.glob("*.*")}
    assert cli.main(args) == 0, "what is finished is only shown again"
    assert {path: path.read_bytes() for path in left.glob("*.*")} == tables


def test_ctrl_c_says_which_command_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", interrupt)
    assert cli.main(["demo", "--out", "my runs", "--steps=2"]) == 130
    assert "goes on from here: lightning-rkd demo --out 'my runs' --steps=2\n" in capsys.readouterr().out


def test_a_demo_with_other_settings_is_left_as_it_is(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was made from other pictures in the same folder."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", interrupt)
    args = ["--data", str(photos), "--steps", "7", "--seeds", "2", "--out", "out"]
    assert cli.main(["demo", *args]) == 130
    before = (Path("out") / demo.MADE_BY).read_bytes()
    untrained(monkeypatch)
    error = error_of([*args, "--steps", "8"], capsys)
    assert "'out' holds a demo with other settings (steps 7 there, 8 now): choose another folder with --out" in error
    assert "seeds [0, 1] there, [1] now" in error_of([*args, "--seeds", "1,"], capsys)
    Image.new("RGB", (16, 16)).save(photos / "group0" / "class0" / "0.png")
    assert "(images " in error_of(args, capsys)
    assert (Path("out") / demo.MADE_BY).read_bytes() == before


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (97, 1), (100, 2), (500, 10), (5000, 100), (101 * 50, 101)])
def test_steps_are_divided_into_epochs_that_each_leave_a_checkpoint(steps: int, epochs: int) -> None:
    plan = demo._with_steps(demo._letters_plan(), steps)
    for config in (plan.teacher, plan.alone, plan.distilled):
        assert config["trainer"]["max_epochs"] == epochs
        assert config["data"]["init_args"]["batches_per_epoch"] * epochs == steps


def test_output_that_cannot_be_written_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    Path("file").write_text("in the way")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("no demo made this")
    assert "the output folder 'file' is a file" in error_of(["--out", "file"], capsys)
    assert "the output folder 'file/sub/demo' cannot be written" in error_of(["--out", "file/sub/demo"], capsys)
    assert "'mine' holds something that no demo made" in error_of(["--out", "mine"], capsys)
    assert Path("mine/thesis.tex").exists()


def test_a_demo_that_was_killed_in_its_first_write_begins_anew(tmp_path: Path) -> None:
    """What SIGKILL leaves of a file that is not whole yet."""
    (tmp_path / f".{demo.MADE_BY}.part").write_text("made_by: lightning-r")
    options.check_folder(tmp_path, demo.MADE_BY, "demo")
    assert demo._begin(tmp_path, {"seeds": [0]}) is False
    assert [path.name for path in tmp_path.iterdir()] == [demo.MADE_BY]
    assert demo._begin(tmp_path, {"seeds": [0]}) is True


def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    (tmp_path / "empty").mkdir()
    (tmp_path / "few" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "few" / "a" / "1.png")
    assert "there is no folder absent" in error_of(["--data", "absent"], capsys)
    assert "no images under empty" in error_of(["--data", "empty"], capsys)
    assert "at least 6 are needed" in error_of(["--data", "few"], capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("5,2", (5, 2)), ("7,", (7,)), ("0, 1", (0, 1))]
)
def test_seeds_are_a_number_or_a_list(text: str, seeds: tuple[int, ...]) -> None:
    assert options.seeds(text) == seeds


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--seeds", "x"], ["--seeds", "1,1"], ["--seeds=-1"],
                                    ["--steps", "0"], ["--steps", "x"], ["--lr", "1"]])  # fmt: skip
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *option]) == 2
    assert "error: " in capsys.readouterr().err


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--data", "--seeds", "--steps", "--out"))
