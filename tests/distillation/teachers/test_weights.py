"""Weights are loaded from intact files that fit, or not at all."""

import hashlib
import importlib.util
from argparse import Namespace
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_rkd.distillation.teachers import Teacher, load_weights
from tests.harness import nets

WRAPPERS = ("state_dict", "model", "teacher", "ema", "model_state", "network")


def prefixed(prefix: str, network: nn.Module, shift: float = 0.0) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v + shift if v.is_floating_point() else v for k, v in network.state_dict().items()}


def saved(tmp_path: Path, form: str, network: nn.Module) -> Path:
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_file(network.state_dict(), path)
        return path
    forms: dict[str, Any] = {
        "plain": network.state_dict(),
        "legacy": network.state_dict(),
        "checkpoint": {"epoch": 3, "state_dict": prefixed("student.", network) | {"loss.scale": torch.ones(1)}},
        **{key: {key: network.state_dict(), "epoch": 3, "args": Namespace(lr=0.1)} for key in WRAPPERS},
        "ema within": {
            "ema": {"module": network.state_dict(), "decay": 0.999},
            "optimizer": {"state": {0: {"exp_avg": 1}}},
        },
        "averaged": {"state_dict": prefixed("", network), "current_model_state": prefixed("", network, 1)}
        | {"pytorch-lightning_version": "2.6.0"},
        "compiled": {"model": prefixed("module._orig_mod.", network)},
        "deep": {"state_dict": prefixed("net.backbone.", network) | {"net.head.weight": torch.ones(2)}},
        "the student of several": {
            "state_dict": prefixed("a.", network, 1) | prefixed("student.", network) | prefixed("z.", network, 1)
        },
    }
    torch.save(forms[form], path, _use_new_zipfile_serialization=form != "legacy")
    return path


@pytest.mark.parametrize(
    "form",
    [
        *WRAPPERS,
        "plain",
        "checkpoint",
        "deep",
        "the student of several",
        "safetensors",
        "ema within",
        "averaged",
        "compiled",
    ],
)
def test_weights_are_found_under_any_prefix(form: str, tmp_path: Path) -> None:
    network, other = nets.teacher(norm=True, seed=1), nets.teacher(norm=True, seed=2)
    path = saved(tmp_path, form, network)
    teacher = Teacher(other, weights=path)
    assert nets.gap(other, network) > 0, "nothing is read before training begins"
    teacher.attach(None)
    assert nets.gap(other, network) == 0.0


def flip_a_bit(path: Path, network: nets.Backbone) -> None:
    """Flip one in the first weight."""
    content = bytearray(path.read_bytes())
    content[content.index(network.first.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    network = nets.teacher(norm=True)
    path = saved(tmp_path, "checkpoint", network)
    flip_a_bit(path, network)
    with pytest.raises(ValueError, match=r"weights\.pt' is damaged in '.*'; use an earlier one"):
        load_weights(network, path)


@pytest.mark.parametrize("form", ["plain", "safetensors", "legacy"])
def test_a_flipped_bit_is_found_by_the_sha256_beside_the_file(form: str, tmp_path: Path) -> None:
    network, other = nets.teacher(seed=1), nets.teacher(seed=2)
    path = saved(tmp_path, form, network)
    beside = path.with_name(f"{path.name}.sha256")  # as sha256sum writes it
    beside.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    load_weights(other, path)
    assert nets.gap(other, network) == 0.0
    flip_a_bit(path, network)
    with pytest.raises(ValueError, match=r"weights\.\w+' does not have the SHA-256 that '.*\.\w+\.sha256' gives"):
        load_weights(other, path)
    assert nets.gap(other, network) == 0.0, "nothing was loaded"


def test_a_file_without_checksums_is_refused_with_the_cure(tmp_path: Path) -> None:
    network, other = nets.teacher(seed=1), nets.teacher(seed=2)
    path = saved(tmp_path, "legacy", network)
    with pytest.raises(ValueError, match=r"before torch 1\.6, .* save it again, torch\.save\(torch\.load\(") as refused:
        load_weights(other, path)
    exec(str(refused.value).split("save it again, ")[1])
    load_weights(other, path)
    assert nets.gap(other, network) == 0.0


@pytest.mark.parametrize("form", ["plain", "checkpoint", "safetensors"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_but_not_masks(form: str, value: float, tmp_path: Path) -> None:
    network, other = nets.teacher(seed=1), nets.teacher(seed=2)
    for net in (network, other):
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    load_weights(other, saved(tmp_path, form, network))
    before = nets.snapshot(other)
    with torch.no_grad():
        network.last.bias[0] = value
    with pytest.raises(ValueError, match=r"holds NaN or infinity in '[\w.]*last\.bias'"):
        load_weights(other, saved(tmp_path, form, network))
    assert nets.same(before, other)


@pytest.mark.parametrize("form", ["plain", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_cut_short_is_refused(form: str, share: float, tmp_path: Path) -> None:
    path = saved(tmp_path, form, nets.teacher())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    message = r"weights\.\w+' (is damaged or cut short|holds no weights that can be read .* torch\.save\(net)"
    with pytest.raises(ValueError, match=message):
        load_weights(nets.teacher(), path)


WHOLE = nets.teacher().state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, r"needs 4 tensors such as 'first.weight', the file has \['a'\]"),
        ([1, 2], "the file has none"),
        ({"epoch": 3}, "the file has none"),
        (
            dict.fromkeys(("model", "ema"), WHOLE),
            r"under several prefixes, \['ema\.', 'model\.'\]; save the state dict",
        ),
        (
            nn.Linear(1, 1),
            r"an object of torch\.nn\.modules\.linear\.Linear; .* torch\.save\(net\.state_dict\(\), path\)",
        ),
        (nets.Backbone().state_dict(), r"'first.weight' has shape \(8, 6\) in the file, the network needs \(10, 6\)"),
        ({k: v for k, v in WHOLE.items() if k != "last.bias"}, r"'last.bias' is not in the file, .* \(1 of 4 tensors"),
        ({f"{p}.{k}": v for p in "ab" for k, v in WHOLE.items()}, r"under several prefixes, \['a\.', 'b\.'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_none_is_loaded(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    network = nets.teacher(seed=1)
    before = nets.snapshot(network)
    with pytest.raises(ValueError, match=message) as refused:
        load_weights(network, tmp_path / "weights.pt")
    assert nets.same(before, network)
    traceback = "".join(format_exception(refused.value))
    assert "arbitrary code" not in traceback, "PyTorch's advice to switch its protection off"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"the weights file 'nowhere\.ckpt' does not exist"):
        Teacher(nets.teacher(), weights="nowhere.ckpt").attach(None)


def test_the_folder_of_a_sharded_checkpoint_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are a folder, as sharded checkpoints are.*consolidate_checkpoint"):
        Teacher(nets.teacher(), weights=tmp_path).attach(None)
    assert importlib.util.find_spec("lightning.pytorch.utilities.consolidate_checkpoint") is not None


def test_a_compiled_network_is_given_the_weights_of_a_plain_one(tmp_path: Path) -> None:
    source, network = nets.teacher(seed=1), nets.teacher(seed=2)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    torch.save(torch.compile(source, backend="eager").state_dict(), tmp_path / "compiled.pt")
    load_weights(torch.compile(network, backend="eager"), tmp_path / "plain.pt")
    assert nets.gap(network, source) == 0.0
    other = nets.teacher(seed=2)
    load_weights(other, tmp_path / "compiled.pt")
    assert nets.gap(other, source) == 0.0
