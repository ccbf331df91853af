"""Small teachers and data for the command distill; teachers are named python:tests.cli.distill.toys:NAME."""

import csv
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.cli.distill.embedding import BATCH

WORDS = ["card", "cash", "loan", "rate", "fee", "bank", "pay", "lost", "open", "bill"]
TEXTS = ["lost my card", "open a new account for the loan"]
WIDTH = 6


def save_vit(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Image processor and network of a small vision transformer of transformers, saved in a folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16
    )
    torch.manual_seed(1)
    network = transformers.ViTModel(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **settings)
    for part in (network, processor):
        part.save_pretrained(folder)
    return processor, network


def save_bert(folder: Path) -> tuple[Any, Any]:
    """Network and tokenizer of a small encoder of transformers, saved in a folder."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*WORDS, *" ".join(TEXTS).split()})]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(1)
    network = transformers.BertModel(config).eval()
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return network, tokenizer


def save_sentence_transformer(folder: Path, pooling: str = "mean") -> Any:
    """A small model of sentence-transformers, saved in a folder."""
    package = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    save_bert(folder / "encoder")
    modules = [models.Transformer(str(folder / "encoder")), models.Pooling(16, pooling)]
    model = package.SentenceTransformer(modules=modules, device="cpu")
    model.save(str(folder))
    return model


def embed_images(images: Sequence[Any]) -> Tensor:
    """Mean and spread of the colours."""
    x = torch.stack([torch.from_numpy(np.array(image)).float() for image in images])
    return torch.cat([x.mean((1, 2)), x.std((1, 2))], 1) / 255


def embed_texts(texts: Sequence[str]) -> Tensor:
    """Sum of a random vector for each word, the first one counting more."""
    vectors = [[_vector(word) for word in text.split()] for text in texts]
    return torch.stack([torch.stack([0.5 * rows[0], *rows]).sum(0) for rows in vectors])


def _vector(word: str) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def embed_rows(rows: Tensor) -> Tensor:
    return rows[:, :WIDTH].tanh()


def build_teacher() -> Callable[[Any], Tensor]:
    return embed_images


class Colours(nn.Module):
    """A network with a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, WIDTH, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 3 * WIDTH).view(WIDTH, 3))

    def transform(self, image: Any) -> Tensor:
        return torch.from_numpy(np.array(image)).float().mean((0, 1)) / 255

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Bare(nn.Linear):
    """A network without a transform."""

    def __init__(self) -> None:
        super().__init__(3, 2)


def gives_nan(items: Any) -> Tensor:
    """Ones, and NaN in the fourth row of a batch that is not full."""
    x = torch.ones(len(items), WIDTH)
    if len(items) < BATCH:
        x[3:4] = torch.nan
    return x


def gives_too_few(items: Any) -> Tensor:
    return torch.ones(1, WIDTH)


def write_texts(path: Path, count: int = 120, classes: int = 10) -> Path:
    """A table of texts whose class is their first word."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "topic"])
        for i in range(count):
            words = [WORDS[i % classes], *rng.choice(WORDS, 3)]
            writer.writerow([" ".join(words), WORDS[i % classes]])
    return path
