"""The command distill on a teacher and a student of each kind, labelled and unlabelled, and its resumption."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_rkd.cli import main as cli
from lightning_rkd.cli.distill import run
from lightning_rkd.export import load
from tests.cli.commands.test_distill import FAST, TOYS, scores
from tests.cli.distill import toys
from tests.cli.distill.test_teachers import to_onnx
from tests.harness import replicas


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Puts the path of a model, which is made once, in place of its name in a specification."""
    root = tmp_path_factory.mktemp("models")

    def make(spec: str) -> str:
        form, _, name = spec.partition(":")
        if form == "timm":
            pytest.importorskip("timm")
        if name not in MODELS:
            return spec
        if not (root / name).exists():
            MODELS[name](root / name)
        return f"{form}:{root / name}"

    return make


def save_onnx_of_images(path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    to_onnx(network, torch.zeros(2, 3, 20, 20), path)


MODELS: dict[str, Callable[[Path], Any]] = {
    "vit": toys.save_vit,
    "bert": toys.save_bert,
    "sentences": toys.save_sentence_transformer,
    "images.onnx": save_onnx_of_images,
    "rows.onnx": lambda path: to_onnx(nn.Linear(9, 4), torch.zeros(2, 9), path),
}


def write_table(path: Path) -> None:
    with toys.write_texts(Path("texts.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)


def write_rows(path: Path) -> None:
    x = torch.randn(100, 9)
    save_file({"rows": x}, path)
    save_file({"embeddings": x[:, :4].tanh()}, "teacher.safetensors")
    np.save("labels.npy", np.arange(100) % 10)


DATA: dict[str, Callable[[Path], Any]] = {
    "photos": lambda path: replicas.photos(path, images=3, size=16),
    "texts": write_table,
    "rows": write_rows,
}


@pytest.mark.parametrize(
    ("teacher", "student", "data", "labels"),
    [
        ("torchvision:mobilenet_v3_small@none", "convnet", "photos", "--unlabelled"),
        ("onnx:images.onnx", "torchvision:mobilenet_v3_small@none", "photos", None),
        ("timm:resnet10t@none", "resnet8", "photos", None),
        ("hf:vit", "hf:vit", "photos", "--unlabelled"),
        ("hf:bert", "hf:bert", "texts.csv", "--label-column=topic"),
        ("sentence-transformers:sentences", "sentence-transformers:sentences", "texts.jsonl", "--label-column=topic"),
        ("sentence-transformers:sentences", "vocabulary", "texts.csv", "--unlabelled"),
        (f"{TOYS}:embed_texts", "hashed", "texts.parquet", "--label-column=topic"),
        ("onnx:rows.onnx", "auto", "rows.safetensors", "--labels=labels.npy"),
        ("embeddings:teacher.safetensors", "mlp", "rows.safetensors", "--unlabelled"),
    ],
)
def test_a_distillation_of_each_kind_and_its_resumption(
    teacher: str, student: str, data: str, labels: str | None, models: Callable[[str], str]
) -> None:
    """The exported student, given the samples themselves, gives the embeddings that were evaluated."""
    DATA[Path(data).stem](Path(data))
    args = ["distill", f"--teacher={models(teacher)}", f"--student={models(student)}", f"--data={data}", *FAST]
    args += ["--image-size=32"] if data == "photos" else []
    args += [] if labels is None else [labels]
    assert cli.main(args) == 0
    of_teacher, of_student = scores("runs/distill")
    assert ("recall@1, teacher's gallery" in of_student) == (labels != "--unlabelled")
    assert of_student["width"] == of_teacher["width"]
    held, exported = load_file("runs/distill/held_out.safetensors"), load("runs/distill/student")
    samples = run.read_samples(data).fetch(held["rows"].tolist())
    torch.testing.assert_close(exported(samples), held["student"], atol=1e-5, rtol=1e-4)
    assert cli.main(args) == 0
    assert scores("runs/distill") == [of_teacher, of_student]
