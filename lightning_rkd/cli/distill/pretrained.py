"""Networks of torchvision, timm, transformers and sentence-transformers as teachers of images or texts."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.cli.distill.samples import Kind
from lightning_rkd.distillation import pooling as poolings
from lightning_rkd.distillation.teachers.pretrained import build_timm, build_torchvision
from lightning_rkd.distillation.teachers.weights import load_weights
from lightning_rkd.utils.imports import MissingExtraError, require

Loaded = tuple[nn.Module, Callable[[Any], Any], Callable[[Any, Any], Tensor]]
POOLINGS = ("mean", "cls", "last", "pooler")


def load_torchvision(rest: str, kind: Kind) -> Loaded:
    """Load a classification network of torchvision without its classifier."""
    _check_kind("torchvision", kind, "image")
    from torchvision.models import get_model_weights

    name, weights, file = _parse_weights(rest)
    named = isinstance(weights, str)
    network, _ = build_torchvision(name, weights, False, download=bool(weights) and file is None)
    if file is not None:
        load_weights(network, file)
    transform = get_model_weights(name)[weights if named else "DEFAULT"].transforms()
    return network, _stacked(transform), _read_output


def load_timm(rest: str, kind: Kind) -> Loaded:
    """Load a network of timm without its classifier."""
    _check_kind("timm", kind, "image")
    timm = require("timm", extra="timm")
    name, weights, file = _parse_weights(rest)
    network, _ = build_timm(name, bool(weights) and file is None, False)
    if file is not None:
        load_weights(network, file)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    return network, _stacked(transform), _read_output


def load_transformers(source: str, kind: Kind, pooling: str | None) -> Loaded:
    """Load a network of transformers, with its processor of images or its tokenizer."""
    _check_kind("hf", kind, "image", "text")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    transformers = require("transformers", extra="transformers")
    network: nn.Module = transformers.AutoModel.from_pretrained(source)
    encode = getattr(network, f"get_{kind}_features", None)  # of networks of images and texts such as CLIP
    if encode is not None:
        network = _Branch(network, f"get_{kind}_features")
        pooling = pooling or "pooler"  # the projected embedding, since transformers 5; before, the output is just that
    if kind == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        return (
            network,
            lambda items: {"pixel_values": processor(items, return_tensors="pt")["pixel_values"]},
            Pool(pooling or ("cls" if _has_class_token(network) else "mean")),
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    longest = min(tokenizer.model_max_length, (getattr(network, "config", None) and _positions(network)) or 512)

    def tokenize(items: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(items), padding=True, truncation=True, max_length=longest, return_tensors="pt"))

    return network, tokenize, Pool(pooling or "mean")


def open_sentence_transformer(source: str) -> Any:
    """Open a model of sentence-transformers on the CPU."""
    if find_spec("sentence_transformers") is None:
        raise MissingExtraError("sentence-transformers is not installed: pip install sentence-transformers")
    return import_module("sentence_transformers").SentenceTransformer(source, device="cpu")


def load_sentence_transformer(source: str, kind: Kind) -> Loaded:
    """Load a model of sentence-transformers."""
    _check_kind("sentence-transformers", kind, "text")
    network = open_sentence_transformer(source)
    tokenize = getattr(network, "preprocess", network.tokenize)  # its name since release 5.2
    return _Nested(network), lambda items: tokenize(list(items)), lambda output, inputs: output["sentence_embedding"]


class _Nested(nn.Module):
    """Passes all inputs as one mapping."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> Any:
        return self.network(inputs)


class _Branch(nn.Module):
    """One of the encoders of a network of images and texts."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.network, self.method)(**inputs)


class Pool:
    """Reads embeddings from the output of a network of transformers."""

    def __init__(self, pooling: str) -> None:
        self.pooling = pooling

    def __call__(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (N, D)."""
        if isinstance(output, Tensor):
            return output
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError("pooling='pooler': the network has no pooler; take 'mean' or 'cls'")
            pooled: Tensor = output.pooler_output
            return pooled
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean(dim=(2, 3))
        pool = {"mean": poolings.mean_pool, "cls": poolings.cls_token, "last": poolings.last_token_pool}[self.pooling]
        return pool(hidden, inputs)


def _has_class_token(network: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in network.named_parameters())


def _positions(network: nn.Module) -> int | None:
    found: int | None = getattr(network.config, "max_position_embeddings", None)
    return found


def _read_output(output: Any, inputs: Any) -> Tensor:
    found: Tensor = output
    return found.mean(dim=(2, 3)) if found.ndim == 4 else found


def _stacked(transform: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    return lambda items: torch.stack([transform(item) for item in items])


def _parse_weights(rest: str) -> tuple[str, bool | str, Path | None]:
    """Name of the model, name of weights (``True`` for the default, ``False`` for none), and file of weights."""
    name, _, weights = rest.partition("@")
    if weights in ("", "DEFAULT"):
        return name, True, None
    if weights == "none":
        return name, False, None
    if Path(weights).suffix:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"the weights {weights!r} of {name} do not exist")
        return name, True, Path(weights)
    return name, weights, None


def _check_kind(form: str, kind: Kind, *kinds: Kind) -> None:
    if kind not in kinds:
        raise TypeError(f"a teacher {form}:... takes {' or '.join(kinds)} samples, and these are of kind {kind}")
