"""Text networks are exported with the pooling that reads them, for batches and texts of any length."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_rkd import cls_token, mean_pool
from lightning_rkd.cli import main as cli
from lightning_rkd.export import ExportError, export, load

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
EXAMPLE = {"input_ids": torch.arange(8)[None] * 7, "attention_mask": torch.ones(1, 8, dtype=torch.long)}


def bert(**settings: Any) -> nn.Module:
    """Random weights, of a size that costs nothing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network: nn.Module = transformers.BertModel(transformers.BertConfig(**SIZES, **settings)).eval()
    return network


def texts(rows: int, length: int) -> dict[str, Tensor]:
    """Tokens, of which the last ones of each row are padding."""
    ids, mask = torch.randint(50, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, max(1, length - row) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def pooled(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens that the mask leaves, by hand."""
    states, mask = network(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
    return (states * mask).sum(1) / mask.sum(1)


def test_a_transformer_gives_the_same_numbers_in_every_file_at_any_length(tmp_path: Path) -> None:
    network = bert()
    done = export(network, dict(reversed(EXAMPLE.items())), tmp_path / "out", read=mean_pool)
    assert not done.failed
    program = torch.export.load(done.folder / "student.pt2").module()
    loaded = load(done.folder, bert())
    for rows, length in ((1, 1), (2, 8), (5, 3), (3, 30)):
        inputs = texts(rows, length)
        expected = pooled(network, inputs).detach()
        torch.testing.assert_close(program(**inputs), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(run_onnx(done.folder / "student.onnx", inputs), expected, rtol=0, atol=1e-5)
        assert torch.equal(pooled(loaded, inputs), expected)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["inputs"]["input_ids"] == {"shape": ["N", "T"], "dtype": "int64"}
    card = (done.folder / "README.md").read_text()
    assert "- attention_mask: (N, T), int64, N and T any number" in card
    assert "(N, 16), float32, read by `mean_pool`" in card
    assert '.run(None, {"attention_mask": attention_mask, "input_ids": input_ids})' in card


@pytest.mark.parametrize(
    ("read", "by_hand"),
    [("pooler_output", lambda out: out.pooler_output), (cls_token, lambda out: out.last_hidden_state[:, 0])],
    ids=["field", "function"],
)
def test_the_program_gives_what_is_read(read: Any, by_hand: Any, tmp_path: Path) -> None:
    network, inputs = bert(), texts(3, 5)
    done = export(network, EXAMPLE, tmp_path / "out", read=read, formats=["torch"])
    found = torch.export.load(done.folder / "student.pt2").module()(**inputs)
    torch.testing.assert_close(found, by_hand(network(**inputs)), rtol=0, atol=1e-6)
    assert not network._forward_hooks, "the user's own network is left alone"


class Bag(nn.Module):
    """A mean of embeddings of tokens, the mask by position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, :, None]
        pooled: Tensor = self.last((self.table(ids) * mask).sum(1) / mask.sum(1))
        return pooled


class Fixed(nn.Module):
    """Takes eight tokens, no more and no less."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(50, 2), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(self.table(ids).flatten(1))
        return out


def test_positional_inputs_are_numbered_in_the_files(tmp_path: Path) -> None:
    network, (ids, mask) = Bag(), texts(3, 11).values()
    done = export(network, tuple(EXAMPLE.values()), tmp_path / "out", formats=["torch", "onnx"])
    expected = network(ids, mask).detach()
    found = torch.export.load(done.folder / "student.pt2").module()(ids, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    onnx = run_onnx(done.folder / "student.onnx", {"input_0": ids, "input_1": mask})
    torch.testing.assert_close(onnx, expected, rtol=0, atol=1e-6)


def test_pooling_finds_a_mask_that_is_passed_by_position(tmp_path: Path) -> None:
    """Padding averaged in would be off by 0.46."""
    network, inputs = bert(), texts(3, 5)
    done = export(network, tuple(EXAMPLE.values()), tmp_path / "out", read=mean_pool, formats=["torch"])
    found = torch.export.load(done.folder / "student.pt2").module()(*inputs.values())
    torch.testing.assert_close(found, pooled(network, inputs), rtol=0, atol=1e-6)


def test_a_network_that_fixes_the_number_of_tokens_says_so(tmp_path: Path) -> None:
    done = export(Fixed(), EXAMPLE["input_ids"], tmp_path / "out", formats=["safetensors", "torch"])
    assert not done.failed
    assert "- input: (N, 8), int64, N any number" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "gave BaseModelOutput.* read='pooler_output', or how to pool it, read=mean_pool"),
        ({"read": "pooled"}, KeyError, r"no 'pooled' .*\['last_hidden_state', 'pooler_output'\]"),
        ({"read": "last_hidden_state", "example": {"input_ids": [1]}}, TypeError, "tuple or mapping of tensors, got"),
    ],
)
def test_what_is_missing_is_said(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(bert(), **{"example": EXAMPLE, "folder": tmp_path / "out", "formats": ["safetensors"], **settings})


class Wrapped(nn.Module):
    """Takes what it passes on, as the wrappers of PEFT do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bag()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.net(*args, **kwargs)
        return out


def test_inputs_that_a_wrapper_passes_on_are_named_in_the_program(tmp_path: Path) -> None:
    inputs = dict(zip(("ids", "mask"), texts(3, 5).values(), strict=True))
    example = dict(zip(inputs, EXAMPLE.values(), strict=True))
    done = export(network := Wrapped(), example, tmp_path / "out", formats=["torch"])
    found = torch.export.load(done.folder / "student.pt2").module()(**inputs)
    torch.testing.assert_close(found, network(**inputs), rtol=0, atol=1e-6)


def branching(output: Any, kwargs: Any) -> Tensor:
    """Looks at values."""
    first: Tensor = output.last_hidden_state[:, 0]
    return first if float(first.sum()) > 0 else -first


def test_a_format_that_cannot_hold_the_pooling_says_why(tmp_path: Path) -> None:
    done = export(bert(), EXAMPLE, tmp_path / "out", read=branching, formats=["safetensors", "torch"])
    assert "must not branch on the values of tensors" in done.failed["torch"]
    with pytest.raises(ExportError, match="must not branch"):
        export(bert(), EXAMPLE, tmp_path / "other", read=branching, formats=["torch"])


@pytest.mark.parametrize("options", [[], ["--read=pooler_output"]], ids=["read of the student layer", "--read"])
def test_the_command_exports_a_transformer_of_a_configuration(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = {
        "class_path": "transformers.BertModel",
        "init_args": {"config": {"class_path": "transformers.BertConfig", "init_args": SIZES}},
    }
    layer = {"class_path": "lightning_rkd.Tap", "init_args": {"read": "lightning_rkd.mean_pool"}}
    model = {"student": student, "student_layer": layer, "inputs": list(EXAMPLE)}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"init_args": model}}))
    network, inputs = bert(), texts(3, 5)
    torch.save({"state_dict": {f"student.{name}": x for name, x in network.state_dict().items()}}, "mine.ckpt")
    files = ["--config=mine.yaml", "--ckpt_path=mine.ckpt", "--out=out", "--formats=safetensors,torch", "--tokens=8"]
    assert cli.main(["export", *files, *options]) == 0
    expected = network(**inputs).pooler_output if options else pooled(network, inputs)
    found = torch.export.load("out/student.pt2").module()(**inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(load("out")(**inputs).pooler_output, network(**inputs).pooler_output)
