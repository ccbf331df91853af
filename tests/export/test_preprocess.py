"""A student exported with its preprocessing takes images, texts or vectors, with and without PyTorch."""

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_rkd.cli.commands.export import _parse
from lightning_rkd.data.transforms.crop import CentreCrop
from lightning_rkd.export import (
    Embedder,
    ImagePreprocess,
    PiecesPreprocess,
    TokensPreprocess,
    VectorPreprocess,
    export,
    load,
)
from lightning_rkd.export.read import build_network
from lightning_rkd.models import ConvNet, HashedText, VectorMLP

GREY = {"mean": (0.5,), "std": (0.25,)}


def photo(width: int = 60, height: int = 44) -> Image.Image:
    """A smooth image, on which resizing methods agree, with some texture."""
    x, y = np.meshgrid(np.linspace(0, 5, width), np.linspace(0, 4, height))
    waves = [np.sin(x + k) * np.cos(y - k) * 110 + 128 + (x * 7 % 9) for k in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def test_images_are_those_of_torchvisions_transform() -> None:
    from torchvision.models import ResNet18_Weights

    transform = ResNet18_Weights.DEFAULT.transforms()
    ours = ImagePreprocess((224, 224), crop=224 / 256, interpolation="bilinear")
    image = photo(400, 320)
    torch.testing.assert_close(ours([image])[0], transform(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (80, 60)], ids=["smaller", "larger"])
@pytest.mark.parametrize(("crop", "method"), [(1.0, "bicubic"), (0.8, "bicubic"), (0.9, "bilinear")])
@pytest.mark.parametrize("fit", ["cover", "stretch"])
def test_tensors_are_resized_as_images_of_pillow(size: tuple[int, int], crop: float, method: Any, fit: Any) -> None:
    preprocess = ImagePreprocess(size, crop=crop, interpolation=method, fit=fit)
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None]
    by_pillow, from_bytes = preprocess([photo()]), preprocess(pixels)
    torch.testing.assert_close(from_bytes, preprocess(pixels / 255), atol=1e-6, rtol=0)
    assert by_pillow.shape == from_bytes.shape == (1, 3, *size)
    assert (by_pillow - from_bytes).abs().max() * 0.224 * 255 < 1.1, "levels of 255, which Pillow rounds twice"


def test_stretched_images_are_cut_as_by_the_data_modules() -> None:
    preprocess = ImagePreprocess((20, 20), crop=20 / 24, interpolation="bilinear", fit="stretch")
    small = photo().resize((24, 24), Image.Resampling.BILINEAR)
    middle = CentreCrop(20)(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None])
    assert (preprocess.read_pixels([photo()]).int() - middle.int()).abs().max() <= 1


def test_grey_and_colour_are_converted_alike_in_both_forms() -> None:
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None]
    grey = ImagePreprocess((44, 44), **GREY)
    assert (grey([photo()]) - grey(pixels)).abs().max() * 0.25 * 255 <= 1.01
    colour = ImagePreprocess((44, 44))([photo().convert("L")])
    assert torch.equal(colour, ImagePreprocess((44, 44))([photo().convert("L").convert("RGB")]))


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo().save(tmp_path / "turned.png", exif=exif)
    preprocess = ImagePreprocess((44, 44))
    upright = preprocess([photo().transpose(Image.Transpose.ROTATE_270)])
    assert torch.equal(preprocess([tmp_path / "turned.png"]), upright)
    assert not torch.equal(preprocess([photo()]), upright)


def test_pieces_are_hashed_as_written_by_hand() -> None:
    text = "Where's my 2nd card?"
    words = ["where", "s", "my", "2nd", "card"]
    parts = [["<whe", "wher", "here", "ere>"], [], ["<my>"], ["<2nd", "2nd>"], ["<car", "card", "ard>"]]
    by_hand = [piece for word, some in zip(words, parts, strict=True) for piece in (word, *some)]
    rows = [1 + zlib.crc32(piece.encode()) % 2047 for piece in by_hand]
    assert PiecesPreprocess(2048)([text]).tolist() == [rows]
    assert PiecesPreprocess(2048, longest=3)([text]).tolist() == [rows[:3]]
    assert torch.equal(PiecesPreprocess()(["\uff33TRASSE Ünï"]), PiecesPreprocess()(["strasse ünï"]))


def test_a_vocabulary_leaves_out_what_it_lacks() -> None:
    preprocess = PiecesPreprocess.from_texts(["my card", "my cat", "a cat"], rows=5)
    assert preprocess.vocabulary == ("<cat", "<my>", "cat", "cat>")
    assert preprocess(["a cat of my own", "nothing", ""]).tolist() == [[3, 1, 4, 2], [0] * 4, [0] * 4]


def test_a_text_network_averages_its_rows_without_padding() -> None:
    torch.manual_seed(0)
    net = HashedText(50, 6, hidden=8, embedding_dim=4)
    bag = nn.EmbeddingBag.from_pretrained(net.table.weight, mode="mean", padding_idx=0)
    pieces = torch.tensor([[3, 7, 7, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(net(pieces), net.head(net.backbone(bag(pieces))), atol=1e-6, rtol=0)
    assert net(pieces).isfinite().all(), "a text without words"


@pytest.mark.parametrize(
    "build",
    [
        {"class_path": "HashedText", "init_args": {"rows": 20, "dim": 4, "embedding_dim": 5}},
        {"class_path": "VectorMLP", "init_args": {"in_features": 3, "hidden": 4, "embedding_dim": 5}},
        {"class_path": "CIFARResNet", "init_args": {"depth": 8, "stem_stride": 4}},
    ],
    ids=lambda build: build["class_path"],
)
def test_a_configuration_names_the_networks_briefly(build: dict[str, Any]) -> None:
    import yaml

    parser, parsed = _parse(nn.Module, "student", build)
    network = build_network(yaml.safe_load(parser.dump(parsed))["student"])
    assert type(network).__name__ == build["class_path"]


def test_a_wider_stem_makes_the_maps_of_large_images_those_of_small_ones() -> None:
    from lightning_rkd.models import CIFARResNet

    net = CIFARResNet(8, stem_stride=4)
    assert net.stage1(net.stem(torch.zeros(1, 3, 224, 224))).shape == (1, 16, 56, 56)
    assert CIFARResNet(8).stem[0].weight.shape == (16, 3, 3, 3), "published networks stay as they are"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["lightning_rkd"] = sys.modules["transformers"] = None
sys.path.insert(0, "out")
import numpy as np
from use import embed
np.save("again.npy", embed({items}))
"""


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "my", "card", "lost"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


class MaskedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[:, :, None].float()
        return (self.table(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "pieces", "vocabulary", "tokens", "vector"])
def test_use_py_gives_the_loaded_students_embeddings(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    texts = ["my card, my lost card", "lost", "straße"]
    photo().save("a.png")
    photo(30, 70).save("b.png")
    np.save("rows.npy", rows := np.random.default_rng(0).normal(size=(70, 3)).astype(np.float32))
    known = PiecesPreprocess.from_texts(texts, 40)
    network, preprocess, items, written = {
        "image": (ConvNet((4, 8), 6, in_channels=3), ImagePreprocess((20, 24), crop=0.9), ["a.png", "b.png"], None),
        "pieces": (HashedText(64, 4, 8, 6), PiecesPreprocess(64), texts, None),
        "vocabulary": (HashedText(40, 4, 8, 6), known, texts, None),
        "tokens": (MaskedMean(), TokensPreprocess(tokenizer(), longest=4), texts, None),
        "vector": (VectorMLP(3, 8, 6), VectorPreprocess(3), rows, 'np.load("rows.npy")'),
    }[kind]
    export(network, preprocess(items), "out", formats=["torch", "onnx"], preprocess=preprocess)
    student = load("out")
    assert isinstance(student, Embedder)
    code = WITHOUT_TORCH.format(items=written or repr(items))
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.from_numpy(np.load("again.npy")), student(items), atol=1e-5, rtol=0)
    card = Path("out/README.md").read_text()
    assert "from use import embed" in card
    assert f"- items: {preprocess.describe()}" in card


def exported(folder: Path, **options: Any) -> nn.Module:
    """A network of vectors, exported into ``folder``."""
    torch.manual_seed(0)
    build = {"class_path": "lightning_rkd.models.VectorMLP", "init_args": {"in_features": 3, "hidden": 4}}
    network = build_network(build).eval()
    export(network, torch.zeros(2, 3), folder, formats=["safetensors"], build=build, **options)
    return network


def test_a_loaded_student_computes_in_batches_without_gradients(tmp_path: Path) -> None:
    network, x = exported(tmp_path / "out", preprocess=VectorPreprocess(3)), torch.randn(150, 3)
    student = load(tmp_path / "out")
    for found in (student(x), student(x.tolist()), student.train()(x, batch_size=7)):
        torch.testing.assert_close(found, network(x), atol=1e-6, rtol=1e-5)
        assert not found.requires_grad
    assert not student.network.training, "train() leaves it in eval mode"


def test_an_export_without_preprocessing_loads_as_its_network(tmp_path: Path) -> None:
    network, x = exported(tmp_path / "out"), torch.randn(5, 3)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["preprocess"]  # as before there was any
    path.write_text(json.dumps(config))
    student = load(tmp_path / "out")
    assert type(student) is VectorMLP
    assert torch.equal(student(x), network(x))


class TwoOutputs(nn.Linear):
    """A network of which a part of the output is read."""

    def __init__(self) -> None:
        super().__init__(3, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return {"embedding": super().forward(x), "logits": x}


def test_what_is_read_of_the_output_is_what_the_loaded_student_gives(tmp_path: Path) -> None:
    network, build = TwoOutputs(), {"class_path": f"{__name__}.TwoOutputs"}
    x = torch.randn(2, 3)
    for formats in (["safetensors", "torch"], ["safetensors"]):
        out = tmp_path / str(len(formats))
        export(network, x, out, read="embedding", formats=formats, build=build, preprocess=VectorPreprocess(3))
    torch.testing.assert_close(load(tmp_path / "2")(x.tolist()), network(x)["embedding"].detach())
    assert torch.equal(load(tmp_path / "1")(x)["embedding"], network(x)["embedding"])


def test_a_tokenizer_of_another_student_is_refused(tmp_path: Path) -> None:
    preprocess = TokensPreprocess(tokenizer())
    export(MaskedMean(), preprocess(["my card"]), tmp_path / "out", formats=["torch"], preprocess=preprocess)
    (tmp_path / "out" / "tokenizer.json").write_text((tmp_path / "out" / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json' is damaged, or of another student"):
        load(tmp_path / "out")


RGB = ImagePreprocess((8, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RGB([Image.new("I;16", (8, 8))]), TypeError, "item 0: .* in 8 bits.* got an image of mode I;16"),
        (lambda: RGB([photo(), 3]), TypeError, "item 1: expected an image of Pillow .* got int"),
        (lambda: RGB("photo.jpg"), TypeError, r"a list of images, got a single one: pass \[image\]"),
        (lambda: RGB(photo()), TypeError, r"a list of images, got a single one: pass \[image\]"),
        (lambda: ImagePreprocess(224), ValueError, r"size \(height, width\) .* got 224"),
        (lambda: RGB(torch.full((1, 3, 8, 8), -1.9)), ValueError, "got -1.9 to -1.9: undo the normalisation"),
        (lambda: RGB(torch.zeros(3, 8, 8)), ValueError, r"expected images \(N, C, H, W\)"),
        (lambda: PiecesPreprocess()("my card"), TypeError, r"a list of texts, got a single one: pass \[text\]"),
        (lambda: PiecesPreprocess()(["my card", None]), TypeError, "item 1: expected a text, got NoneType"),
        (lambda: VectorPreprocess(3)(torch.zeros(2, 4)), ValueError, r"expected vectors \(N, 3\), got .* \(2, 4\)"),
        (lambda: ImagePreprocess((8, 8), mean=(0.5,)), ValueError, "tuples of 1 or 3 channels"),
        (lambda: ImagePreprocess((8, 8), mean=0.5, std=0.5), ValueError, "as tuples of .* got 0.5 and 0.5"),  # type: ignore[arg-type]
        (lambda: RGB([np.zeros((8, 8, 3))]), TypeError, r"bytes \(H, W, 3\), got an array of float64 \(8, 8, 3\)"),
        (lambda: Embedder(nn.Identity(), RGB)(photo()), TypeError, r"a list, got a single item .*: pass \[item\]"),
        (lambda: PiecesPreprocess(3, ("a", "b", "c")), ValueError, "a vocabulary of 3 needs as many rows and one more"),
        (lambda: Embedder(VectorMLP(3), VectorPreprocess(3))([]), ValueError, "the list of items is empty"),
    ],
)
def test_items_that_do_not_fit_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_is_no_fast_tokenizer_is_refused() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"or a tokenizer, AutoTokenizer\.from_"):
        TokensPreprocess("bert-base-uncased")
    with pytest.raises(TypeError, match=r"a object has no tokenizer\.json"):
        TokensPreprocess(object())


def test_a_function_of_ones_own_cannot_be_exported_as_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a Preprocess of lightning_rkd\.export, got function"):
        exported(tmp_path / "out", preprocess=lambda items: items)
    assert not (tmp_path / "out").exists()
