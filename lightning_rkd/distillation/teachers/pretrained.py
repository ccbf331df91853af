"""Networks of timm, torchvision and transformers, with transforms to the images that they have been trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_rkd.data.transforms.teacher import Renormalize, Resize, Statistics
from lightning_rkd.utils.imports import require

_log = logging.getLogger(__name__)
_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which image processors hold


def build_timm(name: str, pretrained: bool, classifier: bool, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network of timm, with the images of its configuration."""
    timm = require("timm", extra="timm")
    network: nn.Module = timm.create_model(name, pretrained, **({} if classifier else {"num_classes": 0}), **kwargs)
    images = timm.data.resolve_model_data_config(network)
    return network, {
        "statistics": (images["mean"], images["std"]),
        "size": kwargs.get("img_size") or images["input_size"][1:],
        "interpolation": images["interpolation"],
    }


def build_torchvision(
    name: str, pretrained: bool | str, classifier: bool, download: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a classification network of torchvision, with the images of its weights."""
    from torchvision.models import get_model_weights  # which takes a second

    from lightning_rkd.models.backbones import build_classifier, torchvision_embedder

    entry = pretrained if isinstance(pretrained, str) else "DEFAULT"
    weights = entry if download else None
    if classifier:
        network = build_classifier(name, weights)
    else:
        network = torchvision_embedder(name, weights=weights).get_submodule("backbone")
    images = get_model_weights(name)[entry].transforms()
    return network, {
        "statistics": (images.mean, images.std),
        "size": images.crop_size * 2,
        "interpolation": images.interpolation.value,
    }


def build_transformers(
    source: Any, model_class: str, processor: Any, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network of transformers from a name, a folder or a configuration, with the images of its processor."""
    transformers = require("transformers", extra="transformers")
    factory = getattr(transformers, model_class)
    if isinstance(source, str | Path):
        network = factory.from_pretrained(source, **kwargs)
        if processor is None and "pixel_values" in network.main_input_name:
            processor = source
    else:
        network = getattr(factory, "from_config", factory)(source, **kwargs)
    if isinstance(processor, str | Path):
        processor = transformers.AutoImageProcessor.from_pretrained(processor)
    if processor is None:
        return network, {"size": getattr(network.config, "image_size", None)}
    sizes: Any = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    edge = sizes.get("shortest_edge")
    return network, {
        "statistics": (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0]),
        "size": (sizes["height"], sizes["width"]) if edge is None else edge,
        "interpolation": _MODES.get(processor.resample, "bicubic"),
    }


def match_images(
    who: str,
    student_normalization: Statistics | None,
    image_size: int | tuple[int, int] | None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    size: Any = None,
    interpolation: str = "bicubic",
) -> list[nn.Module]:
    """Transforms from the student's images to those of a teacher."""
    transforms: list[nn.Module] = []
    if (size := image_size or size) is not None:
        transforms.append(Resize(size, "bilinear" if interpolation == "bilinear" else "bicubic"))
    if student_normalization is not None:
        if statistics is None:
            raise ValueError(
                f"{who}: student_normalization needs the teacher's statistics, and its source has none: pass "
                "processor=..., or Teacher(network, transform=Renormalize(student=..., teacher=...))"
            )
        transforms.append(Renormalize(student_normalization, (list(statistics[0]), list(statistics[1]))))
    elif statistics is not None:
        _log.info(
            "%s: images are taken as normalised with the teacher's mean %s and std %s; if they are not, pass "
            "student_normalization=(mean, std)", who, *statistics,
        )  # fmt: skip
    return transforms
