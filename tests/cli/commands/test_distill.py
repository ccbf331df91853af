"""The command distill on miniature data: its files, resuming, every mistake, and the same in Python."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_rkd import distill, plots
from lightning_rkd.cli import main as cli
from lightning_rkd.cli.distill import embedding, run, training
from lightning_rkd.export import load
from lightning_rkd.losses import CSD, Matryoshka
from tests.cli.distill import toys
from tests.cli.test_main import error_of as main_error_of
from tests.harness import replicas
from tests.harness.platforms import posix_only
from tests.harness.processes import end_of, start

TOYS = "python:tests.cli.distill.toys"
FILES = {
    "distill.yaml",
    "state.json",
    "teacher",
    "training",
    "student",
    "held_out.safetensors",
    "table.md",
    "report.html",
}
FAST = ["--batch-size=12", "--epochs=3", "--precision=32", "--formats=safetensors", "--device=cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return replicas.photos(tmp_path / "photos", images=6, size=16)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return toys.write_texts(tmp_path / "texts.csv")


def scores(out: str | Path) -> list[dict[str, Any]]:
    """The table without times."""
    table = json.loads(Path(out, "state.json").read_text())["table"]
    return [{name: value for name, value in row.items() if name != "ms"} for row in table]


def test_images_go_from_a_folder_to_an_exported_student(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "--teacher", f"{TOYS}:embed_images", "--data", "photos", *FAST]) == 0
    said, out = capsys.readouterr().out, Path("runs/distill")
    assert "48 images of 8 classes, divided by class, 4 to train and 2 to validate, 2 to test" in said
    assert "projected/" not in said
    for words in ("recall@1, teacher's gallery", "common neighbours", "rank correlation", "export.load("):
        assert words in said
    assert {path.name for path in out.iterdir()} == FILES
    teacher, student = scores(out)
    assert teacher["width"] == student["width"] == toys.WIDTH
    held, exported = load_file(out / "held_out.safetensors"), load(out / "student")
    data = run.read_samples("photos")
    rows = held["rows"].tolist()
    torch.testing.assert_close(exported(data.fetch(rows)), held["student"])
    torch.testing.assert_close(toys.embed_images(data.fetch(rows)), held["teacher"])
    assert data.labels is not None
    assert torch.equal(data.labels[rows], held["labels"])
    assert "What the student kept of its teacher" in (out / "report.html").read_text()


def test_images_without_labels_are_shown_beside_their_neighbours(photos: Path) -> None:
    args = ["--teacher", f"{TOYS}:embed_images", "--data", "photos", "--unlabelled", *FAST]
    assert cli.main(["distill", *args]) == 0
    assert "<h2>The nearest images</h2>" in Path("runs/distill/report.html").read_text()
    assert "10 held-out samples" in Path("runs/distill/table.md").read_text()
    assert "in common, 1.000 by chance" in Path("runs/distill/table.md").read_text()


def test_pictures_compare_by_cosine_as_the_table_does(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    draw = plots.neighbours
    monkeypatch.setattr(plots, "neighbours", lambda *args, **kwargs: drawn.append(args[2]) or draw(*args, **kwargs))
    args = ["--teacher", f"{TOYS}:embed_images", "--data", "photos", *FAST]
    assert cli.main(["distill", *args]) == 0
    held = load_file("runs/distill/held_out.safetensors")
    for name in ("teacher", "student"):
        torch.testing.assert_close(drawn[0][name], held[name] / held[name].norm(dim=1, keepdim=True))


def test_what_the_command_chooses_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--teacher", f"{TOYS}:embed_images", "--data", "photos", *FAST]
    assert cli.main(["distill", *args]) == 0
    said = capsys.readouterr().out
    count = scores("runs/distill")[1]["parameters"]
    assert f"Student: resnet8, {count:,} parameters, on images of 16 x 16 pixels." in said
    assert "Loss: 3 * RKD(distance_weight=1.0, " in said
    assert "AdamW, batches of 12, learning rate up to 0.01." in said
    assert "Training for 3 epochs of 2 steps (about " in said


def test_the_model_card_has_the_scores(texts: Path) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--label-column=topic", *FAST]
    assert cli.main(["distill", *args]) == 0
    card, student = Path("runs/distill/student/README.md").read_text(), scores("runs/distill")[1]
    assert "On 24 held-out samples." in card
    for name in ("recall@1", "recall@1, teacher's gallery", "common neighbours", "rank correlation"):
        assert f"| {name} | {student[name]:.4f} |" in card


def test_the_order_of_embeddings_that_are_there_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("teacher.npy", torch.randn(48, 5).numpy())
    assert cli.main(["distill", "--teacher=embeddings:teacher.npy", "--data=photos", *FAST]) == 0
    order = "in the order of the data: row 0, group0/class0/0.png, to row 47, group1/class7/5.png."
    assert order in capsys.readouterr().out


def test_texts_without_labels(texts: Path) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--epochs=30", *FAST[2:], "--batch-size=24"]
    assert cli.main(["distill", *args]) == 0
    (_, student) = scores("runs/distill")
    assert "recall@1" not in student
    assert student["common neighbours"] > 0.35  # at random 10 of 23
    assert student["rank correlation"] > 0.3
    assert load("runs/distill/student")(["lost card", "open bank"]).shape == (2, toys.WIDTH)


def test_test_data_of_their_own_are_labelled_though_the_data_are_not(texts: Path) -> None:
    toys.write_texts(Path("test.csv"), 40)
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--unlabelled", "--label-column", "topic"]
    assert cli.main(["distill", *args, "--test-data", "test.csv", *FAST]) == 0
    assert "recall@1, teacher's gallery" in scores("runs/distill")[1]
    assert len(load_file("runs/distill/held_out.safetensors")["rows"]) == 40


def test_embeddings_teach_vectors_with_a_file_of_labels() -> None:
    x = torch.randn(200, 9)
    np.save("rows.npy", x.numpy())
    np.save("teacher.npy", toys.embed_rows(x).numpy())
    Path("labels.txt").write_text("\n".join(str(i % 10) for i in range(200)))
    args = ["--teacher", "embeddings:teacher.npy", "--data", "rows.npy", "--labels", "labels.txt", *FAST]
    assert cli.main(["distill", *args]) == 0
    teacher, student = scores("runs/distill")
    assert "ms" not in teacher
    assert student["rank correlation"] > 0.2
    assert load("runs/distill/student")(x[:3]).shape == (3, toys.WIDTH)


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["lightning_rkd"] = None
sys.path.insert(0, "runs/distill/student")
import numpy as np
from use import embed
texts, labels, teacher = json.load(open("held.json")), np.load("labels.npy"), np.load("teacher_rows.npy")
student = embed(texts)
unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
near = unit[0] @ unit[1].T
np.fill_diagonal(near, -np.inf)
np.save("again.npy", student)
print(float(np.mean(labels[near.argmax(1)] == labels)))
"""


def test_the_exported_student_needs_numpy_and_onnxruntime_alone(texts: Path) -> None:
    """Embeddings to 1e-5, and the same recall in the gallery that the teacher has saved."""
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--label-column=topic", "--epochs=20"]
    assert cli.main(["distill", *args, "--batch-size=24", "--device=cpu"]) == 0
    held, data = load_file("runs/distill/held_out.safetensors"), run.read_samples("texts.csv")
    Path("held.json").write_text(json.dumps(data.fetch(held["rows"].tolist())))
    np.save("labels.npy", held["labels"].numpy())
    np.save("teacher_rows.npy", held["teacher"].numpy())
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.from_numpy(np.load("again.npy")), held["student"], atol=1e-5, rtol=0)
    assert float(done.stdout) == pytest.approx(scores("runs/distill")[1]["recall@1, teacher's gallery"])


def test_a_student_of_another_width_has_a_projection_that_is_exported_too(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--label-column=topic", "--embedding-dim=4"]
    assert cli.main(["distill", *args, *FAST]) == 0
    assert "  projected/ " in capsys.readouterr().out
    own, projected = (load(f"runs/distill/{name}") for name in ("student", "projected"))
    a, b = own(["lost card"] * 2), projected(["lost card"] * 2)
    assert (a.shape, b.shape) == ((2, 4), (2, toys.WIDTH))
    student = scores("runs/distill")[1]
    assert student["width"] == 4
    assert "recall@1, teacher's gallery" in student


def test_python_objects_give_the_same_as_the_command(photos: Path) -> None:
    assert cli.main(["distill", "--teacher", f"{TOYS}:embed_images", "--data", "photos", *FAST]) == 0
    options: dict[str, Any] = {"batch_size": 12, "epochs": 3, "precision": "32", "formats": ["safetensors"]}
    data = run.read_samples("photos")
    done = distill(toys.embed_images, "auto", data, **options, device="cpu", out="python")
    assert [{k: v for k, v in row.items() if k != "ms"} for row in done.table] == scores("runs/distill")
    assert done.student(data.fetch([0])).shape == (1, toys.WIDTH)
    assert "<h2>Again</h2>" in Path("runs/distill/report.html").read_text()
    assert "<h2>Again</h2>" not in Path("python/report.html").read_text()
    rows = distill(toys.embed_images(data.fetch(range(48))), "auto", data, **options, device="cpu", out="rows")
    assert rows.table[1]["common neighbours"] == done.table[1]["common neighbours"]


def test_a_network_of_ones_own_is_a_student() -> None:
    x = torch.randn(100, 5)
    network = nn.Linear(5, 3)
    before = network.weight.detach().clone()
    options: dict[str, Any] = {"batch_size": 20, "epochs": 2, "formats": ["safetensors"], "device": "cpu"}
    done = distill(toys.embed_rows, network, x, **options)
    assert not torch.equal(network.weight, before)
    assert done.student(x[:2]).shape == (2, 5)  # in the teacher's space, by the projection


def test_a_student_of_other_inputs_is_named_with_what_it_was_called_with() -> None:
    rows = torch.randn(60, 7)
    with pytest.raises(ValueError, match=r"the student Linear cannot take two samples, \(2, 7\) .*take a network for"):
        distill(toys.embed_rows, nn.Linear(5, 6), rows, epochs=1, batch_size=20)


def test_a_loss_that_aligns_nothing_is_warned_of(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--label-column=topic", "--loss=RKD", *FAST]
    assert cli.main(["distill", *args]) == 0
    assert "does not align the student's space with the teacher's" in " ".join(capsys.readouterr().out.split())
    assert "recall@1, teacher's gallery" not in scores("runs/distill")[1]


def test_a_loss_with_a_memory_of_all_samples_knows_their_rows(texts: Path) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--loss=CRD(negatives=8)", *FAST]
    assert cli.main(["distill", *args]) == 0
    state = torch.load("runs/distill/training/last.ckpt", weights_only=True)["state_dict"]
    assert any(x.shape[:1] == (120,) for x in state.values()), "the rows of all data, of which some are held out"


def test_minutes_become_epochs(texts: Path) -> None:
    args = ["--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", "--minutes=0.02", *FAST[2:], "--batch-size=24"]
    assert cli.main(["distill", *args]) == 0
    plan = json.loads(Path("runs/distill/state.json").read_text())["plan"]
    assert plan["epochs"] == max(1, int(60 * 0.02 / (plan["seconds"] * plan["steps"])))
    assert torch.load("runs/distill/training/last.ckpt", weights_only=True)["epoch"] == plan["epochs"] - 1


def test_the_same_command_does_nothing_twice(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["distill", "--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", *FAST]
    assert cli.main(args) == 0
    table = scores("runs/distill")
    monkeypatch.setattr(training, "_measure_step", lambda *args: pytest.fail("it measured"))
    weights = Path("runs/distill/student/student.safetensors").stat().st_mtime_ns
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "Resuming the distillation in runs/distill." in said
    assert "Training is complete: 3 epochs of 7 steps.\n" in said
    assert scores("runs/distill") == table
    assert Path("runs/distill/student/student.safetensors").stat().st_mtime_ns == weights


def test_an_output_folder_of_other_settings_is_refused(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["distill", "--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", *FAST]
    assert cli.main(args) == 0
    code, error = main_error_of([*args, "--seed=1"], capsys)
    assert code == 1
    assert "holds a distillation with other settings (seed 0 there, 1 now): choose another folder" in error
    assert "--teacher embeddings:runs/distill takes the teacher's embeddings of the same data" in error
    error = main_error_of([*args, "--label-column=topic"], capsys)[1]
    assert "(data 120 texts, " in error
    assert "there, 120 texts of 10 classes, " in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher=nothing"], "the teacher 'nothing' has none of the forms torchvision:NAME[@WEIGHTS]"),
        (["--teacher=onnx:absent.onnx"], "the teacher 'absent.onnx' does not exist"),
        (["--teacher=torchvision:resnet0@none"], "these are of kind text"),
        (["--pooling=mean"], "pooling='mean' is for teachers hf:..."),
        (["--student=nothing"], "the student 'nothing' has none of the forms"),
        (["--data=absent"], "there is no data 'absent'"),
        (["--data=empty"], "no images under empty"),
        (["--text-column=question"], "has no column 'question': name one of text, topic with --text-column"),
        (["--teacher=embeddings:few.npy"], "has 5 embeddings for 120 samples: expected a row for each"),
        (["--batch-size=500"], "84 training samples are fewer than a batch of 500"),
        (["--lr=-1"], "lr must be positive, got -1.0"),
        (["--loss=Nothing"], "there is no loss 'Nothing'"),
        (["--loss=CSD(top=1)"], "cannot be read"),
        (
            ["--loss=Matryoshka(loss=CSD, dims=[2])"],
            "expected a number, a text in quotes or a list as an argument, got CSD",
        ),
        (["--loss=CSD + SoftTarget"], "the loss SoftTarget reads logits, and distill compares embeddings"),
        (["--out=file"], "the output folder 'file' is a file"),
        (["--out=few"], "'few' is not the output of a distillation"),
        (["--formats=pickle"], "formats must be some of safetensors, torch, onnx"),
        (["--labels=labels.txt"], "2 labels for 120 samples"),
        (["--test-data=few.npy"], "test_data are of kind vector, and data of kind text"),
    ],
)
def test_a_mistake_is_one_clear_line(
    options: list[str], message: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("few").mkdir()
    Path("few/other.txt").touch()
    Path("file").touch()
    Path("labels.txt").write_text("a\nb\n")
    np.save("few.npy", np.zeros((5, 3), np.float32))
    code, error = main_error_of(
        ["distill", f"--teacher={TOYS}:embed_texts", "--data=texts.csv", *FAST, *options], capsys
    )
    assert code in (1, 2)
    assert message in error
    assert not Path("runs").exists(), "the corrected command would be refused there, as one of other settings"


def test_a_corrected_command_goes_on_in_the_same_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "group0/class0/9.png").write_bytes(b"nothing")
    args = ["distill", "--teacher", f"{TOYS}:embed_images", "--data=photos", *FAST]
    assert "9.png cannot be read" in main_error_of(args, capsys)[1]
    assert cli.main([*args, "--skip-damaged"]) == 0
    assert "48 images of 8 classes" in capsys.readouterr().out


def test_time_is_positive(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["distill", f"--teacher={TOYS}:embed_texts", "--data=texts.csv", "--minutes=0"]
    assert "minutes must be positive, got 0.0" in main_error_of(args, capsys)[1]


def test_embeddings_before_one_that_is_nan_are_kept(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "SHARD_ROWS", 64)
    args = ["distill", f"--teacher={TOYS}:gives_nan", "--data=texts.csv", *FAST]
    assert "embedding of row 67, 'lost " in main_error_of(args, capsys)[1]
    shards = list(Path("runs/distill/teacher").glob("*.safetensors"))
    assert [load_file(path)["/embedding"].shape for path in shards] == [(64, toys.WIDTH)]


def test_another_loss_takes_the_embeddings_of_an_earlier_distillation(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "SHARD_ROWS", 64)
    toys.write_texts(Path("test.csv"), 40)
    args = ["distill", "--data=texts.csv", "--test-data=test.csv", *FAST]
    assert cli.main([*args, f"--teacher={TOYS}:embed_texts"]) == 0
    assert cli.main([*args, "--teacher=embeddings:runs/distill", "--out=again"]) == 0
    assert scores("again")[1] == scores("runs/distill")[1]
    error = main_error_of([*args, "--teacher=embeddings:again", "--out=third"], capsys)[1]
    assert "'again' holds no embeddings of a teacher" in error
    swapped = ["distill", "--data=other.csv", "--test-data=test.csv", *FAST, "--teacher=embeddings:runs/distill"]
    Path("other.csv").write_text(Path("texts.csv").read_text().replace("card", "cord"))
    assert "has embeddings of other samples: give the data of that run" in main_error_of(swapped, capsys)[1]
    assert cli.main([*args, "--label-column=topic", "--teacher=embeddings:runs/distill", "--out=labelled"]) == 0


def test_arrays_that_are_nan_are_named_before_anything_is_written() -> None:
    rows = torch.ones(100, 4)
    rows[7] = torch.nan
    with pytest.raises(ValueError, match="the teacher's embedding of row 7 is NaN or infinite"):
        distill(rows, "auto", torch.randn(100, 5), batch_size=20, out="out")
    assert not Path("out").exists()


def test_a_distillation_is_exported_already(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["distill", "--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", *FAST]
    assert cli.main(args) == 0
    error = main_error_of(["export", "runs/distill", "--out=exported"], capsys)[1]
    assert "exported already, in 'runs/distill/student'" in error
    own, student = load("runs/distill"), load("runs/distill/student")
    assert torch.equal(own(["lost card"]), student(["lost card"]))


def test_a_format_is_added_without_training_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["distill", "--teacher", f"{TOYS}:embed_texts", "--data", "texts.csv", *FAST]
    assert cli.main(args) == 0
    before = load("runs/distill/student")(["lost card"])
    monkeypatch.setattr(training, "_measure_step", lambda *args: pytest.fail("it measured"))
    assert cli.main([*args, "--formats=torch"]) == 0
    there = {path.name for path in Path("runs/distill/student").iterdir()}
    assert {"student.safetensors", "student.pt2"} <= there
    assert torch.equal(load("runs/distill/student")(["lost card"]), before)


def test_a_gpu_that_is_not_there_is_named(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ["distill", f"--teacher={TOYS}:embed_texts", "--data=texts.csv", "--device=cuda"]
    assert "there is no GPU that PyTorch can use" in main_error_of(args, capsys)[1]


def test_a_narrow_student_of_matryoshka_has_no_score_in_that_gallery() -> None:
    options: dict[str, Any] = {"batch_size": 20, "epochs": 1, "formats": ["safetensors"], "device": "cpu"}
    loss = Matryoshka(CSD(), dims=[2, 4])
    labels = [i % 10 for i in range(100)]
    done = distill(toys.embed_rows, nn.Linear(9, 4), torch.randn(100, 9), labels=labels, loss=loss, **options)
    assert "recall@1" in done.table[1]
    assert "recall@1, teacher's gallery" not in done.table[1]


def test_relations_need_no_projection_between_widths() -> None:
    options: dict[str, Any] = {"batch_size": 20, "epochs": 1, "formats": ["safetensors"], "device": "cpu"}
    with pytest.warns(UserWarning, match="does not align"):
        done = distill(toys.embed_rows, nn.Linear(5, 3), torch.randn(100, 5), loss="RKD", **options)
    assert done.student(torch.randn(2, 5)).shape == (2, 3)


PHASES = {
    "teacher": "from lightning_rkd.cli.distill import embedding as m; f = m.write_shard; m.SHARD_ROWS = 32",
    "training": "from lightning_rkd.cli.trainer import WholeCheckpointIO as m; f = m.save_checkpoint",
    "scores": "from lightning_rkd.cli.distill import run as m; f = m.compare_networks",
    "export": "from lightning_rkd.cli.distill import networks as m; f = m.export",
    "report": "from lightning_rkd.cli.distill import report as m; f = m.write_report",
}
KILL = """
import os, signal
{found}
calls = []
def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return f(*args, **kwargs)
setattr(m, f.__name__, killed)
"""


@posix_only
@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("images", ["--data=photos"]),
        ("texts", ["--data=texts.csv", "--label-column=topic"]),
        ("rows", ["--data=rows.npy"]),
    ],
)
def test_a_kill_in_each_phase_is_resumed_to_the_same_table(
    kind: str, options: list[str], photos: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder is killed in every phase, another one in none."""
    monkeypatch.setattr(embedding, "SHARD_ROWS", 32)
    np.save("rows.npy", torch.randn(60, 9).numpy())
    args = ["distill", "--teacher", f"{TOYS}:embed_{kind}", *options, *FAST]
    assert cli.main([*args, "--out=whole"]) == 0
    for phase, found in PHASES.items():
        begun = KILL.format(found=found, number=2 if phase in ("teacher", "training") else 1)
        if phase != "teacher":
            begun = "from lightning_rkd.cli.distill import embedding; embedding.SHARD_ROWS = 32\n" + begun
        code, output = end_of(start(*args, "--out=killed", first=begun))
        assert code == -signal.SIGKILL, (phase, output)
    left = {path.name for path in Path("killed").iterdir()}
    assert {"teacher", "training", "student", "held_out.safetensors"} <= left
    assert cli.main([*args, "--out=killed"]) == 0
    assert scores("killed") == scores("whole")
    for name in ("student/student.safetensors", "held_out.safetensors"):
        one, other = (load_file(Path(out, name)) for out in ("whole", "killed"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in Path("killed").iterdir()} == FILES
