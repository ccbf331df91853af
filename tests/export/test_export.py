"""Exports give the numbers of the student, and need neither teacher nor Lightning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_rkd.export import ExportError, ImagePreprocess, export, formats, load, write
from lightning_rkd.export.read import build_network
from lightning_rkd.models import ConvNet
from lightning_rkd.utils.types import call_network
from tests.harness.platforms import posix_only

M = "lightning_rkd.models"
BACKBONE = {"class_path": f"{M}.ConvNet", "init_args": {"widths": [4, 8], "embedding_dim": 6, "in_channels": 3}}
NETWORKS: dict[str, dict[str, Any]] = {
    "ConvNet": BACKBONE | {"init_args": BACKBONE["init_args"] | {"normalize": True}},
    "CIFARResNet": {"class_path": f"{M}.CIFARResNet", "init_args": {"depth": 8, "channels": [4, 4, 8, 8]}},
    "CIFARWideResNet": {"class_path": f"{M}.CIFARWideResNet", "init_args": {"depth": 16, "widen": 1}},
    "CIFARVGG": {"class_path": f"{M}.CIFARVGG", "init_args": {"depth": 8}},
    "Conv4": {"class_path": f"{M}.Conv4", "init_args": {"in_channels": 3, "width": 4}},
    "Classified": {"class_path": f"{M}.Classified", "init_args": {"backbone": BACKBONE, "num_classes": 5}},
    "Embedded": {"class_path": f"{M}.Embedded", "init_args": {"backbone": BACKBONE, "embedding_dim": 3}},
    "torchvision": {
        "class_path": f"{M}.torchvision_embedder",
        "init_args": {"name": "resnet18", "embedding_dim": 8, "weights": "IMAGENET1K_V1", "small_images": True},
    },
}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}


def trained(build: dict[str, Any]) -> nn.Module:
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    network = build_network(build)
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return network


@posix_only
def test_everybody_who_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    export(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "out", formats=["safetensors", "torch"])
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_each_file_of_every_network_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    network = trained(NETWORKS[name])
    done = export(network, torch.zeros(1, 3, 32, 32), tmp_path / "out", build=NETWORKS[name])
    assert not done.failed
    assert network.training
    x = torch.randn(5, 3, 32, 32)
    expected = network.eval()(x).detach()
    assert torch.equal(load(done.folder)(x), expected)
    torch.testing.assert_close(torch.export.load(done.folder / "student.pt2").module()(x), expected)
    session = onnxruntime.InferenceSession(done.folder / "student.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected, rtol=1e-4, atol=1e-5
    )


def test_loading_brings_neither_lightning_nor_a_teacher(tmp_path: Path) -> None:
    build = NETWORKS["ConvNet"]
    export(trained(build), torch.zeros(1, 3, 32, 32), tmp_path / "out", formats=["safetensors"], build=build)
    program = (
        "import sys, torch; from lightning_rkd.export import load; net = load('out'); "
        "assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 6); "
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'onnx', 'jsonargparse')"
        " or m.startswith('lightning_rkd.distillation.teachers')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_holds_the_students_tensors_and_no_other(tmp_path: Path) -> None:
    network = trained(NETWORKS["Classified"])
    done = export(network, torch.zeros(1, 3, 32, 32), tmp_path / "out", formats=["safetensors"])
    assert set(load_file(done.folder / "student.safetensors")) == set(network.state_dict())
    with pytest.raises(ValueError, match="names no class"):
        load(done.folder)
    torch.manual_seed(1)
    fresh = build_network(NETWORKS["Classified"])
    assert not torch.equal(fresh.classifier.weight, network.classifier.weight)  # type: ignore[arg-type]
    assert torch.equal(load(done.folder, fresh).classifier.weight, network.classifier.weight)  # type: ignore[arg-type]


def test_the_card_says_what_the_network_takes_and_gives(tmp_path: Path) -> None:
    pixels = ImagePreprocess((32, 32), (0.5, 0.25, 0.125), (1.0, 2.0, 4.0))
    network = trained(NETWORKS["ConvNet"])
    done = export(network, torch.zeros(1, 3, 32, 32), tmp_path / "out", formats=["torch"], preprocess=pixels)
    card = (done.folder / "README.md").read_text()
    assert "(N, 3, 32, 32), float32" in card
    assert "(N, 6), float32" in card
    assert "0.5000, 0.2500, 0.1250" in card
    config = json.loads((done.folder / "config.json").read_text())
    assert config["inputs"]["input"]["std"] == [1.0, 2.0, 4.0]
    assert sum(p.numel() for p in network.parameters()) == config["parameters"]


class Branching(nn.Linear):
    """Looks at its values to decide what to do."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if float(out.sum()) > 0 else -out


def test_a_network_that_cannot_be_traced_is_written_in_the_other_formats(tmp_path: Path) -> None:
    network = Branching(3, 2)
    done = export(network, torch.zeros(1, 3), tmp_path / "out", formats=["safetensors", "torch"])
    assert list(done.failed) == ["torch"]
    assert "must not branch" in done.failed["torch"]
    assert sorted(done.files) == ["README.md", "config.json", "student.safetensors"]
    with pytest.raises(ExportError, match="must not branch"):
        export(network, torch.zeros(1, 3), tmp_path / "other", formats=["torch"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("spoil", [lambda x: x + 0.01, lambda x: x * torch.nan], ids=["other numbers", "NaN"])
def test_a_program_that_gives_other_numbers_is_not_put_into_place(
    spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Linear(3, 2)
    monkeypatch.setattr(formats, "_write_torch", lambda program, path: lambda x: spoil(call_network(network, x)))
    with pytest.raises(ExportError, match="gives other numbers"):
        export(network, torch.zeros(1, 3), tmp_path / "out", formats=["safetensors", "torch"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_format_without_the_precision_is_named_and_the_others_written(dtype, tmp_path: Path) -> None:
    network = nn.Conv2d(1, 2, 3).to(dtype).eval()
    build = {"class_path": "torch.nn.Conv2d", "init_args": {"in_channels": 1, "out_channels": 2, "kernel_size": 3}}
    done = export(network, torch.zeros(1, 1, 8, 8, dtype=dtype), tmp_path / "out", build=build)
    assert list(done.failed) == ["onnx"]
    x = torch.randn(3, 1, 8, 8).to(dtype)
    assert torch.equal(load(done.folder)(x), network(x))


def test_a_compiled_network_is_exported_as_the_plain_one(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    done = export(torch.compile(network), torch.zeros(1, 3), tmp_path / "out", formats=["safetensors", "torch"])  # type: ignore[arg-type]
    assert not done.failed
    x = torch.randn(4, 3)
    assert torch.equal(load(done.folder, nn.Linear(3, 2))(x), network(x))


def test_what_would_be_built_as_another_network_is_refused() -> None:
    embedder = {"class_path": f"{M}.torchvision_embedder", "init_args": {"name": "googlenet", "weights": "DEFAULT"}}
    with pytest.raises(ValueError, match="googlenet rescales its inputs"):
        build_network(embedder)
    with pytest.raises(ValueError, match="inception_v3 rescales its inputs"):
        build_network({"class_path": "torchvision.models.inception_v3", "init_args": {"weights": "DEFAULT"}})
    plain = build_network({"class_path": "torchvision.models.resnet18", "init_args": {"weights": "no such weights"}})
    assert type(plain).__name__ == "ResNet"  # nothing was looked for
    with pytest.raises(ValueError, match="dict_kwargs"):
        build_network(LINEAR | {"dict_kwargs": {"bias": False}})


def unannotated(path):
    Path(path).touch()


@pytest.mark.parametrize(
    "build",
    [
        {"class_path": f"{__name__}.unannotated", "init_args": {"path": "called"}},
        {"class_path": "pathlib.Path", "init_args": {}},
        {
            "class_path": f"{M}.Embedded",
            "init_args": {"backbone": {"class_path": f"{__name__}.unannotated", "init_args": {"path": "called"}}},
        },
    ],
)
def test_a_class_is_checked_before_it_is_called(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not called: expected a class, or a function with a class as return"):
        build_network(build)
    assert list(tmp_path.iterdir()) == [], "nothing was called"


def test_what_lies_in_the_folder_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = nn.Linear(3, 2), torch.zeros(1, 3)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no export made"):
            export(*arguments, tmp_path, formats=["safetensors"], overwrite=overwrite)
    export(*arguments, tmp_path / "out", formats=["safetensors"])
    with pytest.raises(FileExistsError, match="earlier export"):
        export(*arguments, tmp_path / "out", formats=["safetensors"])
    export(*arguments, tmp_path / "out", formats=["torch"], overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "student.pt2"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "serve.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds serve\.py, which no export made"):
        export(*arguments, tmp_path / "out", formats=["torch"], overwrite=True)
    assert (tmp_path / "out" / "serve.py").read_text() == "mine"


@posix_only
def test_the_folder_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="the folder you are in"):
        export(nn.Linear(3, 2), torch.zeros(1, 3), ".", formats=["safetensors"])
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    done = export(nn.Linear(3, 2), torch.zeros(1, 3), "link", formats=["safetensors"])
    assert done.folder == tmp_path.resolve() / "there"
    assert (tmp_path / "link").is_symlink()


def test_an_earlier_export_comes_back_where_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "out"
    export(*arguments, formats=["safetensors"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "export":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        export(*arguments, formats=["torch"], overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_of_another_network_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    arguments = {"widths": [4], "embedding_dim": 8}
    build = {"class_path": f"{M}.ConvNet", "init_args": arguments | {"normalize": True}}
    with pytest.raises(ExportError, match=r"student\.safetensors gives other numbers"):
        export(ConvNet(**arguments), torch.zeros(1, 1, 8, 8), tmp_path / "out", formats=["safetensors"], build=build)  # type: ignore[arg-type]


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    export(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "out", formats=["safetensors"], build=LINEAR)
    path = tmp_path / "out" / "student.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "out")
    save_file({"weight": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="damaged, or of another student"):
        load(tmp_path / "out")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="do not fit ConvNet"):
        load(tmp_path / "out", ConvNet())
    with pytest.raises(FileNotFoundError, match="no exported student"):
        load(tmp_path)


class Spoilt(nn.Linear):
    """Gives NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


@pytest.mark.parametrize(
    ("network", "keywords", "error", "message"),
    [
        (nn.Linear(3, 2), {"formats": ["tflite"]}, ValueError, "some of safetensors, torch, onnx, got tflite"),
        (nn.Linear(3, 2), {"formats": []}, ValueError, "got none"),
        (nn.Linear(3, 4), {"build": LINEAR}, ValueError, "another network than the one that is exported"),
        (nn.Linear(3, 2), {"build": {"class_path": "torch.nn.Linar"}}, ValueError, "no class 'torch.nn.Linar'"),
        (nn.Linear(3, 2), {"build": {"class_path": "torch.nn.Linear"}}, ValueError, "could not be built"),
        (nn.LSTM(3, 2), {}, ValueError, "into one tensor"),
        (Spoilt(3, 2), {}, ValueError, "the student itself gives NaN"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    network: nn.Module, keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(network, torch.zeros(1, 3), tmp_path / "out", **{"formats": ["safetensors"], **keywords})
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = write.importlib.util.find_spec
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'lightning-rkd\[export\]'"):
        export(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "out")
