"""``lightning-rkd export``, run for real on a run of a few steps."""

import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import run
from lightning_rkd.cli.experiments.settings import with_settings, with_steps
from lightning_rkd.data import ImageFolderDataModule
from lightning_rkd.data.datamodules.folder import find_images
from lightning_rkd.export import load
from tests.harness import replicas
from tests.harness.processes import GLYPHS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, as compare leaves it."""
    folder = tmp_path_factory.mktemp("run")
    config = yaml.safe_load((recipes.FOLDER / "glyphs_student.yaml").read_text())
    sizes = {"max_classes": 12, "image_size": 12, "classes_per_batch": 4}
    settings = {"trainer.accelerator": "cpu", **{f"data.{name}": value for name, value in sizes.items()}}
    run(with_settings(with_steps(config, 2), settings), folder, 0, None, about={"date": "2026-01-02"})
    return folder


@pytest.fixture
def run_folder(trained: Path, _own_folder: None) -> Path:
    """A copy of the run, in ``run``."""
    return shutil.copytree(trained, Path("run"))


def exported(*options: str) -> int:
    """Exit code of exporting a format that takes no time."""
    return cli.main(["export", "run", "--out=out", "--formats=safetensors", *options])


def test_a_run_becomes_files_that_give_its_students_numbers(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(trained), "--out", "out"]) == 0
    assert "student.onnx differs from the student by at most" in capsys.readouterr().out
    state = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    student = load("out").network
    for name, x in student.state_dict().items():
        assert torch.equal(x, state[f"student.{name}"]), name
    x = torch.rand(3, 1, 12, 12)
    session = onnxruntime.InferenceSession("out/student.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(found, student(x).detach(), rtol=1e-4, atol=1e-5)
    card = Path("out/README.md").read_text()
    for said in ("GlyphDataModule", "- teacher: none", "TripletMarginLoss", "2026-01-02", "| recall_at_1 |"):
        assert said in card
    assert "pixels from 0 to 1, minus the mean" in card
    assert "images are stretched (bilinear) to 12 x 12 pixels and normalised, by `load` and `use.py`" in card


@pytest.mark.parametrize(("width", "height"), [(12, 12), (30, 19), (9, 21)])
def test_files_become_the_inputs_that_the_runs_data_module_makes_of_them(
    width: int, height: int, run_folder: Path
) -> None:
    photos = replicas.photos(Path("photos"), images=2, size=8)
    for path in photos.rglob("*.png"):
        Image.open(path).convert("L").resize((width, height)).save(path)
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    settings = {"root": "photos", "image_size": 12, "classes_per_batch": 2}
    config["data"] = {"class_path": "ImageFolderDataModule", "init_args": settings}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert exported() == 0
    data = ImageFolderDataModule("photos", image_size=12)
    data.setup()
    paths = [path for group in find_images(photos).values() for path in group]
    inputs, student = load("out").preprocess(paths), load("out")
    torch.testing.assert_close(inputs, torch.stack([data.root[i][0] for i in range(len(paths))]), atol=1e-6, rtol=0)
    torch.testing.assert_close(student(paths), student.network(inputs))


def test_a_fit_is_exported_by_its_folder_and_by_its_files() -> None:
    """With short names of classes, which Lightning's loggers get told in full."""
    student = {"class_path": "ConvNet", "init_args": {"widths": [4], "embedding_dim": 8}}
    task = {"class_path": "pytorch_metric_learning.losses.TripletMarginLoss"}
    model = {"class_path": "DistillationModule", "init_args": {"student": student, "task_loss": task}}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": model, "data": {"class_path": "GlyphDataModule"}}))
    small = [option for option in GLYPHS if "logger" not in option]
    fit = ["fit", "--config=mine.yaml", *small, "--data.batches_per_epoch=2", "--trainer.max_epochs=1"]
    assert cli.main([*fit, "--trainer.default_root_dir=run"]) == 0
    assert exported() == 0
    x, logged = torch.rand(3, 1, 12, 12), next(Path("run").glob("*/version_0/config.yaml"))
    state = torch.load("run/last.ckpt", weights_only=True)
    state["state_dict"] = {name.replace("student.", "student._orig_mod."): w for name, w in state["state_dict"].items()}
    torch.save(state, "compiled.ckpt")
    for checkpoint in ("run/last.ckpt", "compiled.ckpt"):
        files = [f"--config={logged}", f"--ckpt_path={checkpoint}", f"--out={checkpoint}.out"]
        assert exported(*files) == 0
        assert torch.equal(load("out")(x), load(f"{checkpoint}.out")(x))


def replace_in(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "last.ckpt").unlink(), "there is no checkpoint"),
        (lambda run: (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:-99]), "damaged or cut short"),
        (lambda run: (run / "config.yaml").write_text("model: {}"), "no model.init_args.student"),
        (lambda run: replace_in(run / "config.yaml", "- 16", "- 17"), "does not fit the configuration's student"),
        (lambda run: replace_in(run / "config.yaml", "max_classes: 12", "max_classes: -1"), "--input 3,32,32"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    change, message: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run_folder)
    assert exported() == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_scores_are_told_of_the_weights_they_were_measured_with_only(run_folder: Path) -> None:
    state = torch.load(run_folder / "last.ckpt", weights_only=True)
    state["state_dict"] = {name: torch.zeros_like(x) for name, x in state["state_dict"].items()}
    torch.save(state, run_folder / "early.ckpt")
    assert exported("--ckpt_path=run/early.ckpt", "--out=early") == 0
    assert "scores: not measured" in Path("early/README.md").read_text()
    assert exported() == 0
    assert "| recall_at_1 |" in Path("out/README.md").read_text()


def test_without_its_data_a_run_is_exported_by_the_shape_that_is_given(run_folder: Path) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"] = {"class_path": "ImageFolderDataModule", "init_args": {"root": "gone"}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert exported() == 1
    assert exported("--input=1,x") == 2
    assert exported("--input=1,12,12") == 0
    assert load("out")(torch.zeros(2, 1, 12, 12)).shape == (2, 32)
