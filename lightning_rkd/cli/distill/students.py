"""Students of ``lightning-rkd distill``, each with its own preprocessing."""

import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_rkd.cli.distill.pretrained import open_sentence_transformer
from lightning_rkd.distillation.teachers.pretrained import build_transformers
from lightning_rkd.distillation.teachers.weights import load_weights
from lightning_rkd.export.preprocess import (
    ImagePreprocess,
    PiecesPreprocess,
    Preprocess,
    TokensPreprocess,
    VectorPreprocess,
)
from lightning_rkd.export.read import build_network
from lightning_rkd.models.backbones import timm_embedder, torchvision_embedder
from lightning_rkd.models.heads import Embedded, count_parameters
from lightning_rkd.utils.imports import MissingExtraError, require

Kind = Literal["image", "text", "vector"]
Build = dict[str, Any]

_M = "lightning_rkd.models."
_RESNETS = {
    "resnet8": (8, [16, 16, 32, 64]),
    "resnet20": (20, [16, 16, 32, 64]),
    "resnet8x4": (8, [32, 64, 128, 256]),
    "resnet20x4": (20, [32, 64, 128, 256]),
    "resnet32x4": (32, [32, 64, 128, 256]),
}  # from small to large
_LONGEST = 256  # tokens of a text
_TABLES = ((2048, 16, 64), (4096, 16, 128), (8192, 32, 128), (16384, 64, 256), (32768, 128, 256))
"""Rows, width and hidden units of networks for texts, from small to large; the second is the default."""

OURS: dict[Kind, tuple[str, ...]] = {
    "image": (*_RESNETS, "convnet", "wrn16-2", "vgg8"),
    "text": ("hashed", "vocabulary"),
    "vector": ("mlp",),
}
"""Short names of small networks without a pretrained part."""

FORMS = {
    "auto": "one of ours, by the data and --parameters",
    ", ".join(name for names in OURS.values() for name in names): "small networks, from random weights",
    "torchvision:NAME[@WEIGHTS]": "DEFAULT, another name of weights, a file, or none for random ones",
    "timm:NAME[@WEIGHTS]": "a file, or none",
    "hf:PATH_OR_NAME": "a model of transformers",
    "sentence-transformers:PATH": "",
    "python:MODULE:FUNCTION": "a function that returns a network",
}
"""Forms of a student."""


@dataclass(frozen=True)
class Student:
    """A network to be trained, and what it takes.

    Attributes:
        network: The network, from inputs to embeddings (N, D).
        preprocess: Function from a list of items to its inputs.
        build: Class path and arguments that rebuild the network without weights, for ``export(build=...)``; ``None``
            where there are none.
        description: The network in words.
    """

    network: nn.Module
    preprocess: Preprocess
    build: Build | None
    description: str

    def describe(self) -> str:
        """The network in words, with the size of its images."""
        if not isinstance(self.preprocess, ImagePreprocess):
            return self.description
        height, width = self.preprocess.size
        return f"{self.description}, on images of {height} x {width} pixels"


def build_student(
    spec: str | nn.Module,
    kind: Kind,
    *,
    embedding_dim: int,
    image_size: int | None = None,
    vector_dim: int | None = None,
    parameters: int | None = None,
    texts: Sequence[str] | None = None,
) -> Student:
    """Build a student by its specification, one of :data:`FORMS`, or from a network.

    A network, given itself or returned by a function, may have an attribute ``preprocess``, a
    :class:`~lightning_rkd.export.preprocess.Preprocess`. The function is called with ``embedding_dim`` if it has such a
    parameter.

    Args:
        spec: The student.
        kind: Kind of the samples.
        embedding_dim: Width of the embedding.
        image_size: Height and width of images; ``None`` takes those of pretrained weights, or 64.
        vector_dim: Width of vectors.
        parameters: Largest number of parameters of ``"auto"``, ``"hashed"``, ``"vocabulary"`` and ``"mlp"``; ``None``
            takes those of the smallest image network for images up to 40 pixels, and about 100,000 for texts.
        texts: Training texts, from which ``"vocabulary"`` takes its words and pieces.

    Raises:
        ValueError: The specification has none of the forms or does not fit the samples, its model cannot be loaded, or
            the budget is too small.
        MissingExtraError: The package that it needs is not installed.

    Example:
        >>> student = build_student("auto", "image", embedding_dim=32, image_size=32)
        >>> student.description, student.preprocess.size
        ('resnet8, 79,472 parameters', (32, 32))
    """
    if not isinstance(spec, str):
        return _from_object(spec, kind, type(spec).__name__, image_size, vector_dim)
    form, _, rest = spec.partition(":")
    if spec in ("auto", *OURS[kind]):
        if kind == "image":
            return _build_image(spec, embedding_dim, image_size or 64, parameters)
        if kind == "text":
            return _build_text(spec, embedding_dim, parameters, texts)
        return _build_vector(embedding_dim, vector_dim, parameters)
    if form == "python" and rest:
        return _from_object(_call(rest, embedding_dim), kind, spec, image_size, vector_dim)
    loaders: dict[str, tuple[tuple[Kind, ...], Callable[[], Student]]] = {
        "torchvision": (("image",), lambda: _load_torchvision(rest, embedding_dim, image_size)),
        "timm": (("image",), lambda: _load_timm(rest, embedding_dim, image_size)),
        "hf": (("image", "text"), lambda: _load_transformers(rest, kind, embedding_dim, image_size)),
        "sentence-transformers": (("text",), lambda: _load_sentence_transformer(rest, embedding_dim)),
    }
    kinds, load = loaders.get(form, ((), None))
    kinds = kinds or tuple(other for other, names in OURS.items() if spec in names)
    fitting = [one for one in list(FORMS)[2:] if kind in loaders.get(one.partition(":")[0], ((kind,),))[0]]
    here = ", ".join(["auto", *OURS[kind], *fitting])
    if kinds and kind not in kinds:
        raise ValueError(
            f"the student {spec!r} is for samples of kind {' or '.join(kinds)}, not {kind}: take one of {here}"
        )
    if load is None or not rest:
        raise ValueError(f"the student {spec!r} has none of the forms {here}")
    try:
        student = load()
    except MissingExtraError:
        raise
    except Exception as error:  # each package has errors of its own for what is not there
        if type(error) is FileNotFoundError:  # a file of weights; errors of the hub are subclasses of it
            raise
        raise ValueError(f"the student {spec!r} could not be loaded: {_first_line(error)}") from error
    return replace(student, description=f"{spec}, {count_parameters(student.network):,} parameters")


def _build_image(name: str, embedding_dim: int, size: int, budget: int | None) -> Student:
    names = [name]
    if name == "auto":
        names = list(_RESNETS) if budget is not None else ["resnet8" if size <= 40 else "resnet20"]
    builds = {one: _describe_image_network(one, embedding_dim, size) for one in names}
    return _build_largest(name, builds, budget, lambda build: _image_preprocess(size))


def _build_text(name: str, embedding_dim: int, budget: int | None, texts: Sequence[str] | None) -> Student:
    if name == "vocabulary" and texts is None:
        raise ValueError("the student 'vocabulary' needs texts, from which it takes its words: take 'hashed'")
    builds = {
        f"{'hashed' if name == 'auto' else name}, {rows:,} x {dim}": _describe(
            f"{_M}HashedText", rows=rows, dim=dim, hidden=hidden, embedding_dim=embedding_dim
        )
        for rows, dim, hidden in (_TABLES[1:2] if budget is None else _TABLES)
    }

    def prepare(build: Build) -> Preprocess:
        rows = build["init_args"]["rows"]
        return PiecesPreprocess(rows) if name != "vocabulary" else PiecesPreprocess.from_texts(texts or (), rows)

    return _build_largest(name, builds, budget, prepare)


def _build_vector(embedding_dim: int, vector_dim: int | None, budget: int | None) -> Student:
    if vector_dim is None:
        raise ValueError("a student of vectors needs their width, vector_dim")
    hidden = 256 if budget is None else max(1, (budget - embedding_dim) // (vector_dim + embedding_dim + 1))
    build = _describe(f"{_M}VectorMLP", in_features=vector_dim, hidden=hidden, embedding_dim=embedding_dim)
    preprocess = VectorPreprocess(vector_dim)
    return _build_largest("mlp", {f"mlp, {hidden} hidden units": build}, budget, lambda build: preprocess)


def _build_largest(
    name: str, builds: Mapping[str, Build], budget: int | None, prepare: Callable[[Build], Preprocess]
) -> Student:
    """The network with the most parameters within the budget."""
    networks = {one: build_network(build) for one, build in builds.items()}
    counts = {one: count_parameters(network) for one, network in networks.items()}
    fitting = [one for one, count in counts.items() if budget is None or count <= budget]
    if not fitting:
        raise ValueError(
            f"the student {name!r} has at least {min(counts.values()):,} parameters with embeddings of this width, and "
            f"the budget is {budget:,}: raise it, or take narrower embeddings"
        )
    chosen = max(fitting, key=counts.__getitem__)
    description = f"{chosen}, {counts[chosen]:,} parameters"
    return Student(networks[chosen], prepare(builds[chosen]), builds[chosen], description)


def _describe(class_path: str, **init_args: Any) -> Build:
    return {"class_path": class_path, "init_args": init_args}


def _describe_image_network(name: str, embedding_dim: int, size: int) -> Build:
    if name == "convnet":
        return _describe(f"{_M}ConvNet", widths=[24, 48, 96], embedding_dim=embedding_dim, in_channels=3)
    if name in _RESNETS:
        depth, widths = _RESNETS[name]
        stride = min(4, max(1, size // 32))
        arguments = {"depth": depth, "channels": widths, "stem_stride": stride}
        backbone = _describe(f"{_M}CIFARResNet", **arguments)
    elif name == "wrn16-2":
        backbone = _describe(f"{_M}CIFARWideResNet", depth=16, widen=2)
    else:
        backbone = _describe(f"{_M}CIFARVGG", depth=8)
    return _describe(f"{_M}Embedded", backbone=backbone, embedding_dim=embedding_dim)


def _image_preprocess(
    size: int | tuple[int, int], mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    crop: float = 1.0, interpolation: str = "bicubic",
) -> ImagePreprocess:  # fmt: skip
    """Preprocessing of images; without statistics those of ImageNet."""
    mean, std = tuple(mean or (0.485, 0.456, 0.406)), tuple(std or (0.229, 0.224, 0.225))
    known: Any = interpolation if interpolation in ("bicubic", "bilinear") else "bicubic"
    return ImagePreprocess((size, size) if isinstance(size, int) else size, mean, std, crop, known)


def _load_torchvision(rest: str, embedding_dim: int, image_size: int | None) -> Student:
    from torchvision.models import get_model_weights

    name, _, weights = rest.partition("@")
    file = bool(Path(weights).suffix)
    entry = "DEFAULT" if weights in ("", "none") or file else weights
    random = weights == "none" or file
    small = image_size is not None and image_size <= 64 and random and name.startswith(("resn", "wide_resn"))
    arguments = {"name": name, "embedding_dim": embedding_dim, "small_images": small}
    network = torchvision_embedder(weights=None if random else entry, **arguments)  # type: ignore[arg-type]
    if getattr(network.get_submodule("backbone"), "transform_input", False):
        raise ValueError(f"{name} rescales its inputs when it is pretrained: take {name}@none, or another model")
    if file:
        load_weights(network.get_submodule("backbone"), weights)
    images = get_model_weights(name)[entry].transforms()
    crop, scaled = images.crop_size[0], images.resize_size[0]
    preprocess = _image_preprocess(
        image_size or crop, images.mean, images.std, crop / scaled, images.interpolation.value
    )
    return Student(network, preprocess, _describe(f"{_M}torchvision_embedder", **arguments), "")


def _load_timm(rest: str, embedding_dim: int, image_size: int | None) -> Student:
    timm = require("timm", extra="timm")
    name, _, weights = rest.partition("@")
    file = weights not in ("", "none", "DEFAULT")
    arguments = {"name": name, "embedding_dim": embedding_dim, "image_size": image_size}
    network = timm_embedder(pretrained=not file and weights != "none", **arguments)  # type: ignore[arg-type]
    if file:
        load_weights(network.get_submodule("backbone"), weights)
    images = timm.data.resolve_model_data_config(network.get_submodule("backbone"))
    size = image_size or tuple(images["input_size"][1:])
    preprocess = _image_preprocess(size, images["mean"], images["std"], images["crop_pct"], images["interpolation"])
    return Student(network, preprocess, _describe(f"{_M}timm_embedder", **arguments), "")


def _load_transformers(source: str, kind: Kind, embedding_dim: int, image_size: int | None) -> Student:
    network: Any
    network, images = build_transformers(source, "AutoModel", None)
    if (network.main_input_name == "pixel_values") != (kind == "image"):
        raise ValueError(f"it takes {network.main_input_name}, and the samples are of kind {kind}")
    config, pooling = json.loads(network.config.to_json_string()), "cls" if kind == "image" else "mean"
    backbone = _describe(f"{_M}TransformerEncoder", source=config, pooling=pooling)
    build = _describe(f"{_M}Embedded", backbone=backbone, embedding_dim=embedding_dim)
    student: Any = build_network(build)
    student.backbone.network = network.float()
    if kind == "image":
        mean, std = images["statistics"]
        preprocess: Preprocess = _image_preprocess(
            image_size or images["size"], mean, std, interpolation=images["interpolation"]
        )
    else:
        tokenizer = require("transformers", extra="transformers").AutoTokenizer.from_pretrained(source)
        positions = getattr(network.config, "max_position_embeddings", _LONGEST)
        preprocess = TokensPreprocess(tokenizer, min(_LONGEST, tokenizer.model_max_length, positions))
    return Student(student, preprocess, build, "")


def _load_sentence_transformer(source: str, embedding_dim: int) -> Student:
    model = open_sentence_transformer(source).float()
    network = _SentenceEncoder(model)
    longest = min(_LONGEST, model.max_seq_length or _LONGEST)
    return Student(Embedded(network, embedding_dim), TokensPreprocess(model.tokenizer, longest), None, "")


class _SentenceEncoder(nn.Module):
    """A model of sentence-transformers, called with its tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.embedding_dim: int = model.get_embedding_dimension()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings: Tensor = self.model({"input_ids": input_ids, "attention_mask": attention_mask})[
            "sentence_embedding"
        ]
        return embeddings


def _call(path: str, embedding_dim: int) -> Any:
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"python:{path} is not there ({_first_line(error)}): name python:MODULE:FUNCTION") from error
    takes = "embedding_dim" in inspect.signature(function).parameters
    return function(embedding_dim=embedding_dim) if takes else function()


def _from_object(network: Any, kind: Kind, name: str, image_size: int | None, vector_dim: int | None) -> Student:
    if not isinstance(network, nn.Module):
        raise TypeError(f"the student {name}: expected a network, an nn.Module, got {type(network).__name__}")
    preprocess = getattr(network, "preprocess", None)
    if preprocess is None:
        if kind == "text":
            raise ValueError(
                f"the student {name} does not say how it takes texts: set its attribute preprocess, such as "
                "PiecesPreprocess() or TokensPreprocess(tokenizer)"
            )
        preprocess = _image_preprocess(image_size or 224) if kind == "image" else VectorPreprocess(vector_dim or 0)
    if not isinstance(preprocess, Preprocess):
        raise TypeError(f"the student {name}: its preprocess must be a Preprocess, got {type(preprocess).__name__}")
    return Student(network, preprocess, None, f"{name}, {count_parameters(network):,} parameters")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
