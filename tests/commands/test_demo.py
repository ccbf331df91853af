"""The demo on miniature settings: what it leaves, what it refuses, and that an interrupted one leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_rkd import cli, recipes, study
from lightning_rkd.commands import demo
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.models.small import ConvNet

LEFT = {"table.md", "table.csv", "runs.csv", "demo.yaml", "neighbours.png", "relations.png", "teacher"}


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
        assert (out / name / "last.ckpt").is_file()
        assert ".demo-" not in (out / name / "config.yaml").read_text(), "no configuration names the temporary folder"

    fit = ["fit", "--config", "out/demo/rkd-4/config.yaml", "--trainer.enable_progress_bar=false"]
    assert cli.main([*fit, "--trainer.default_root_dir=again"]) == 0, "a configuration it left can be run"

    assert cli.main([*args[:-1], "out/demo"]) == 0, "a folder that a demo made is replaced"
    assert {path.name for path in Path("out").iterdir()} == {"demo"}


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


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; from lightning_rkd.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*program, "demo", "--out", "new/runs/demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("new/runs/.demo-*/teacher/config.yaml")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. Nothing was written to new/runs/demo." in output
    assert "Traceback" not in output
    assert not (tmp_path / "new").exists()


def test_an_interrupted_demo_leaves_an_earlier_one_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", interrupt)
    earlier = Path("runs/demo")
    earlier.mkdir(parents=True)
    (earlier / demo.MADE_BY).write_text("earlier")
    assert cli.main(["demo"]) == 130
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]
    assert (earlier / demo.MADE_BY).read_text() == "earlier"


def test_output_that_cannot_be_written_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    Path("file").write_text("in the way")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("no demo made this")
    assert "the output folder 'file' is a file" in error_of(["--out", "file"], capsys)
    assert "the output folder 'file/sub' cannot be written" in error_of(["--out", "file/sub/demo"], capsys)
    assert "'mine' holds something that no demo made" in error_of(["--out", "mine"], capsys)
    assert Path("mine/thesis.tex").exists()


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
    assert demo._seeds(text) == seeds


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--seeds", "x"], ["--seeds", "1,1"], ["--seeds=-1"],
                                    ["--steps", "0"], ["--steps", "x"], ["--lr", "1"]])  # fmt: skip
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *option]) == 2
    assert "error: " in capsys.readouterr().err


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--data", "--seeds", "--steps", "--out"))
