"""The demo on miniature settings: its files, the errors, and resuming after an interruption."""

import csv
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lightning_rkd.cli import main as cli
from lightning_rkd.cli.commands import common, demo
from lightning_rkd.cli.experiments import runs, schedule
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.models.small import ConvNet
from tests.cli.test_main import error_of as main_error_of
from tests.harness import replicas
from tests.harness.platforms import posix_only
from tests.harness.processes import end_of, start

LEFT = {
    "report.html", "table.md", "table.csv", "runs.csv", "demo.yaml", "neighbours.png", "relations.png", "plot.png",
    "teacher", "alone-4", "rkd-4",
}  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return replicas.photos(tmp_path / "photos", images=6, size=16)


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for training would be an error."""
    monkeypatch.setattr(schedule.Worker, "submit", lambda *args: pytest.fail("it trained"))


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code, error = main_error_of(["demo", *args], capsys)
    assert code in (1, 2)
    return error


def scores(out: str) -> list[dict[str, str]]:
    """Every run, without the seconds it took."""
    with Path(out, "runs.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@posix_only
@pytest.mark.campaign
def test_a_demo_stopped_in_a_student_resumes_to_the_same_files(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in the second epoch of a student; then the same command, twice."""
    args = ["demo", "--data", str(photos), "--steps", "100", "--seeds", "4,", "--out", "new/stopped"]
    process, left = start(*args), Path("new/stopped")
    while process.poll() is None and not (left / "alone-4" / "last.ckpt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, output = end_of(process)
    assert code == 143, output
    assert f"Stopped. The same command resumes: lightning-rkd {' '.join(args)}" in output
    assert "Traceback" not in output
    assert {path.name for path in left.iterdir()} == {demo.MADE_BY, "teacher", "alone-4"}
    assert (left / "teacher" / runs.RESULT).exists()
    assert not (left / "alone-4" / runs.RESULT).exists()

    teacher = (left / "teacher" / "last.ckpt").stat().st_mtime_ns
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "Resuming the demo in new/stopped." in text
    assert "student alone, seed 4: resumes after 50 of 100 steps" in text
    for said in ("48 images of 8 classes", "recall_at_1", "map_at_r", "distance_correlation", "Files in new/stopped:"):
        assert said in text
    assert (left / "teacher" / "last.ckpt").stat().st_mtime_ns == teacher, "not trained again"
    assert {path.name for path in left.iterdir()} == LEFT
    rows = [line.split("|")[1].strip() for line in (left / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert rows[2:] == ["teacher", demo.ALONE, demo.DISTILLED]
    assert "With RKD-DA the student's recall@1 on unseen classes changes by" in (left / "table.md").read_text()
    assert cli.main(["export", str(left / "alone-4"), "--out", "exported", "--formats", "safetensors"]) == 0
    assert "- teacher: none" in Path("exported", "README.md").read_text(), "it was only compared with the teacher"
    for name in ("neighbours.png", "relations.png"):
        with Image.open(left / name) as picture:
            assert 1100 <= picture.width <= 1300
    for name in ("teacher", "alone-4", "rkd-4"):
        assert {path.name for path in (left / name).iterdir()} == {"config.yaml", "last.ckpt", "log.txt", runs.RESULT}

    assert cli.main([*args[:-1], "whole"]) == 0
    assert scores("new/stopped") == scores("whole")
    assert (left / "neighbours.png").read_bytes() == Path("whole/neighbours.png").read_bytes()
    untrained(monkeypatch)
    tables = {path: path.read_bytes() for path in left.glob("*.*")}
    assert cli.main(args) == 0, "finished runs are only read"
    assert {path: path.read_bytes() for path in left.glob("*.*")} == tables

    fit = ["fit", "--config", "whole/rkd-4/config.yaml", "--trainer.enable_progress_bar=false"]
    assert cli.main([*fit, "--trainer.default_root_dir=again", "--trainer.max_epochs=1"]) == 0


def test_networks_suit_images_and_the_student_is_a_tenth_of_the_teacher(photos: Path) -> None:
    data, changes = demo.plan_folder(photos, Console(quiet=True))
    assert data.image_shape == (3, 16, 16)
    for comparison, channels in ((demo.plan([3]), 1), (demo.plan([3], None, changes), 3)):
        assert comparison.teacher is not None
        assert comparison.teacher_seed == 3
        configs = [network.config for network in (comparison.teacher, *comparison.networks)]
        assert channels == 1 or all(config["data"]["init_args"]["root"] == str(photos) for config in configs)
        teacher, alone, distilled = (config["model"]["init_args"]["student"]["init_args"] for config in configs)
        assert configs[2]["model"]["init_args"]["teacher"]["init_args"]["network"]["init_args"] == teacher
        assert alone == distilled
        assert teacher.get("in_channels", 1) == alone.get("in_channels", 1) == channels
        assert count_parameters(ConvNet(**alone)) <= count_parameters(ConvNet(**teacher)) / 10


def test_an_interrupted_demo_says_how_to_resume_and_refuses_other_settings(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other pictures in the same folder are other settings."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", interrupt)
    args = ["--data", str(photos), "--seeds", "2", "--out", "my runs", "--steps=7"]
    assert cli.main(["demo", *args]) == 130
    said = capsys.readouterr().out
    assert f"The same command resumes: lightning-rkd demo --data {photos} --seeds 2 --out 'my runs' --steps=7\n" in said
    before = Path("my runs", demo.MADE_BY).read_bytes()
    error = error_of([*args, "--steps", "8"], capsys)
    assert "'my runs' holds a demo with other settings (steps 7 there, 8 now): choose another folder with" in error
    assert "seeds [0, 1] there, [1] now" in error_of([*args, "--seeds", "1,"], capsys)
    Image.new("RGB", (16, 16)).save(photos / "group0" / "class0" / "0.png")
    assert "(images " in error_of(args, capsys)
    assert Path("my runs", demo.MADE_BY).read_bytes() == before


def test_a_demo_that_was_killed_in_its_first_write_begins_anew(tmp_path: Path) -> None:
    """Truncate a file, as SIGKILL would leave it."""
    (tmp_path / f".{demo.MADE_BY}.part").write_text("made_by: lightning-r")
    common.check_folder(tmp_path, demo.MADE_BY, "demo")
    assert common.begin(tmp_path, demo.MADE_BY, {"seeds": [0]}, "demo") is False
    assert [path.name for path in tmp_path.iterdir()] == [demo.MADE_BY]
    assert common.begin(tmp_path, demo.MADE_BY, {"seeds": [0]}, "demo") is True


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--out=file", "the output folder 'file' is a file"),
        ("--out=file/sub/demo", "the output folder 'file/sub/demo' cannot be written"),
        ("--out=few", "'few' is not the output of a demo"),
        ("--data=absent", "there is no folder absent"),
        ("--data=empty", "no images under empty"),
        ("--data=few", "at least 6 are needed"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_before_training(
    option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    Path("file").write_text("in the way")
    Path("empty").mkdir()
    Path("few/a").mkdir(parents=True)
    Image.new("L", (8, 8)).save("few/a/1.png")
    assert message in error_of([option], capsys)
    assert [path.name for path in Path("few").iterdir()] == ["a"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("5,2", (5, 2)), ("7,", (7,)), ("0, 1", (0, 1))]
)
def test_seeds_are_a_number_or_a_list(text: str, seeds: tuple[int, ...]) -> None:
    assert common.seeds(text) == seeds


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--seeds", "x"], ["--seeds", "1,1"], ["--seeds=-1"],
                                    ["--steps", "0"], ["--steps", "x"], ["--lr", "1"]])  # fmt: skip
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *option]) == 2
    assert "error: " in capsys.readouterr().err
