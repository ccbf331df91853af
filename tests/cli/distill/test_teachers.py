"""Teachers by specification: each gives what its own package gives for the same samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from lightning_rkd.cli.distill import students, teachers
from lightning_rkd.cli.distill.embedding import embed_all
from lightning_rkd.cli.distill.samples import read_samples
from lightning_rkd.cli.distill.teachers import open_teacher
from tests.cli.distill import toys

TOYS = "python:tests.cli.distill.toys"
TEXTS = toys.TEXTS


def images(count: int = 3) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(x) for x in pixels]


def test_a_torchvision_teacher_uses_the_transform_of_its_weights(tmp_path: Path) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(1)
    network = resnet18(weights=None).eval()
    network.fc = nn.Identity()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    teacher = open_teacher(f"torchvision:resnet18@{tmp_path / 'weights.pt'}", "image")
    assert teacher.embed is not None
    transform = ResNet18_Weights.DEFAULT.transforms()
    with torch.no_grad():
        expected = network(torch.stack([transform(image) for image in images()]))
    torch.testing.assert_close(teacher.embed(images()), expected)
    assert teacher.parameters == sum(p.numel() for p in network.parameters())


def test_a_timm_teacher_uses_its_own_transform(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    network = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    teacher = open_teacher(f"timm:resnet10t@{tmp_path / 'weights.pt'}", "image")
    assert teacher.embed is not None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        expected = network(torch.stack([transform(image) for image in images()]))
    torch.testing.assert_close(teacher.embed(images()), expected)


@pytest.mark.parametrize(("pooling", "expected"), [(None, "cls"), ("mean", "mean"), ("pooler", "pooler")])
def test_a_vision_transformer_of_transformers_is_pooled(pooling: str | None, expected: str, tmp_path: Path) -> None:
    processor, network = toys.save_vit(tmp_path)
    teacher = open_teacher(f"hf:{tmp_path}", "image", pooling)
    assert teacher.embed is not None
    with torch.no_grad():
        out = network(**processor(images(), return_tensors="pt"))
    hidden = out.last_hidden_state
    wanted = {"cls": hidden[:, 0], "mean": hidden.mean(1), "pooler": out.pooler_output}[expected]
    torch.testing.assert_close(teacher.embed(images()), wanted)


def test_clip_gives_the_embedding_that_its_images_and_texts_share(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16)
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config={**small, "vocab_size": 40})
    config.projection_dim = 5
    network = transformers.CLIPModel(config).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (network, processor):
        part.save_pretrained(tmp_path)
    teacher = open_teacher(f"hf:{tmp_path}", "image")
    assert teacher.embed is not None
    assert teacher.describe().endswith("parameters, pooling pooler")
    with torch.no_grad():
        pooled = network.vision_model(**processor(images(), return_tensors="pt")).pooler_output
        torch.testing.assert_close(teacher.embed(images()), network.visual_projection(pooled))


def mean_of_tokens(network: Any, tokenizer: Any) -> Tensor:
    rows = []
    for text in TEXTS:  # one by one, so that there is no padding
        with torch.no_grad():
            rows.append(network(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1))
    return torch.cat(rows)


def test_a_text_teacher_of_transformers_averages_tokens_without_padding(tmp_path: Path) -> None:
    network, tokenizer = toys.save_bert(tmp_path)
    teacher = open_teacher(f"hf:{tmp_path}", "text")
    assert teacher.embed is not None
    torch.testing.assert_close(teacher.embed(TEXTS), mean_of_tokens(network, tokenizer), atol=1e-5, rtol=1e-4)


def test_a_sentence_transformer_embeds_as_it_does_itself(tmp_path: Path) -> None:
    model = toys.save_sentence_transformer(tmp_path)
    teacher = open_teacher(f"sentence-transformers:{tmp_path}", "text")
    assert teacher.embed is not None
    torch.testing.assert_close(teacher.embed(TEXTS), model.encode(TEXTS, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def to_onnx(network: nn.Module, example: Tensor, path: Path, dynamic: dict[int, Any] | None = None) -> Path:
    import logging
    import warnings

    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            network, (example,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, **(dynamic or {})},),
        )  # fmt: skip
    logging.disable(logging.NOTSET)
    return path


def test_an_onnx_teacher_of_images_reads_its_size_from_its_input(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = to_onnx(network, torch.zeros(2, 3, 20, 24), tmp_path / "teacher.onnx")
    teacher = open_teacher(f"onnx:{path}", "image")
    assert teacher.embed is not None
    assert teacher.describe() == f"onnx:{path}, images of 20 x 24 pixels, normalised as ImageNet's"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = [torch.from_numpy(np.array(image.resize((24, 20), 3))) for image in images()]
    with torch.no_grad():
        expected = network(((torch.stack(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(teacher.embed(images()), expected, atol=1e-5, rtol=1e-4)


def test_an_onnx_teacher_of_tokens_averages_them_without_padding(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *sorted({w for text in TEXTS for w in text.split()})])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = nn.Embedding(len(words), 5)
    example = torch.zeros(2, 4, dtype=torch.int64)
    to_onnx(table, example, tmp_path / "teacher.onnx", {1: torch.export.Dim.DYNAMIC})
    teacher = open_teacher(f"onnx:{tmp_path / 'teacher.onnx'}", "text")
    assert teacher.embed is not None
    expected = torch.stack([table(torch.tensor([words[w] for w in text.split()])).mean(0) for text in TEXTS])
    torch.testing.assert_close(teacher.embed(TEXTS), expected.detach())


def test_an_onnx_teacher_of_vectors_takes_rows(tmp_path: Path) -> None:
    network = nn.Linear(4, 3)
    path = to_onnx(network, torch.zeros(2, 4), tmp_path / "teacher.onnx")
    teacher, x = open_teacher(f"onnx:{path}", "vector"), torch.randn(5, 4)
    assert teacher.embed is not None
    torch.testing.assert_close(teacher.embed(x), network(x).detach())


@pytest.mark.parametrize("name", ["embed_images", "build_teacher"])
def test_a_python_teacher_is_a_function_or_builds_one(name: str) -> None:
    teacher = open_teacher(f"{TOYS}:{name}", "image")
    assert teacher.embed is not None
    torch.testing.assert_close(teacher.embed(images()), toys.embed_images(images()))


def test_a_python_teacher_is_a_network_with_a_transform() -> None:
    teacher, network = open_teacher(f"{TOYS}:Colours", "image"), toys.Colours()
    assert teacher.embed is not None
    expected = network(torch.stack([network.transform(image) for image in images()])).detach()
    torch.testing.assert_close(teacher.embed(images()), expected)
    assert open_teacher(network, "image").key == teacher.key


def test_embeddings_are_rows_of_the_data_and_then_of_the_test_data(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    np.save(tmp_path / "rows.npy", x.numpy())
    source, quiet = open_teacher(f"embeddings:{tmp_path / 'rows.npy'}", "text"), Console(quiet=True)
    rows, rest = embed_all(source, read_samples(list("abc")), read_samples(list("de")), tmp_path, "auto", quiet)
    assert rest is not None
    assert torch.equal(rows, x[:3])
    assert torch.equal(rest, x[3:])
    with pytest.raises(ValueError, match="has 5 embeddings for 3 samples: expected a row for each"):
        embed_all(source, read_samples(list("abc")), None, tmp_path, "auto", quiet)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("resnet50", "image", r"none of the forms torchvision:NAME\[@WEIGHTS\], timm:NAME"),
        ("onnx:", "image", "none of the forms"),
        ("onnx:absent.onnx", "image", "'absent.onnx' does not exist"),
        ("embeddings:absent.npy", "image", "'absent.npy' do not exist"),
        ("torchvision:resnet0@none", "image", "could not be fetched or loaded"),
        ("torchvision:resnet18@absent.pt", "image", "weights 'absent.pt' of resnet18 do not exist"),
        ("torchvision:resnet18@none", "text", "takes image samples, and these are of kind text"),
        ("python:absent:f", "image", "cannot be imported"),
        (f"{TOYS}:Bare", "image", "has no transform: give the network an attribute transform"),
        (f"{TOYS}:WORDS", "image", "neither a function, a network nor an array"),
    ],
)
def test_a_teacher_that_cannot_be_opened_is_an_error(spec: str, kind: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError, TypeError), match=message):
        open_teacher(spec, kind)


def test_a_hub_that_is_not_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is a FileNotFoundError, as is that of weights which do not exist."""

    class LocalEntryNotFoundError(FileNotFoundError):
        pass

    def fail(*args: Any) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(teachers, "load_timm", fail)
    with pytest.raises(ValueError, match="'timm:vit' is not here, and could not be fetched or loaded"):
        open_teacher("timm:vit", "image")
    monkeypatch.setattr(students, "_load_timm", fail)
    with pytest.raises(ValueError, match="the student 'timm:vit' could not be loaded: An error happened"):
        students.build_student("timm:vit", "image", embedding_dim=4)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="is not here, and could not be fetched or loaded") as error:
        open_teacher(f"hf:{tmp_path / 'absent'}", "text")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("gives_nan", "embedding of row 3"), ("gives_too_few", "one row each")])
def test_bad_embeddings_are_named(name: str, message: str, tmp_path: Path) -> None:
    source = open_teacher(f"{TOYS}:{name}", "text")
    with pytest.raises(ValueError, match=message):
        embed_all(source, read_samples(list("abcdef")), None, tmp_path, "auto", Console(quiet=True))
