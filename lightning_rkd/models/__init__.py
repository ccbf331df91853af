"""Networks: for CIFAR, few-shot learning and the recipes, torchvision's with an embedding, heads, and prototypes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.models.backbones import torchvision_embedder
    from lightning_rkd.models.cifar_resnet import CIFARResNet
    from lightning_rkd.models.cifar_vgg import CIFARVGG
    from lightning_rkd.models.cifar_wide_resnet import CIFARWideResNet
    from lightning_rkd.models.classified import Classified
    from lightning_rkd.models.conv4 import Conv4
    from lightning_rkd.models.embedded import Embedded
    from lightning_rkd.models.heads import EmbeddingHead, L2Normalize, count_parameters
    from lightning_rkd.models.prototypes import PrototypicalLoss
    from lightning_rkd.models.small import ConvNet

__all__ = [
    "CIFARVGG",
    "CIFARResNet",
    "CIFARWideResNet",
    "Classified",
    "Conv4",
    "ConvNet",
    "Embedded",
    "EmbeddingHead",
    "L2Normalize",
    "PrototypicalLoss",
    "count_parameters",
    "torchvision_embedder",
]

_HOME = {
    "CIFARVGG": "cifar_vgg",
    "CIFARResNet": "cifar_resnet",
    "CIFARWideResNet": "cifar_wide_resnet",
    "Classified": "classified",
    "Conv4": "conv4",
    "ConvNet": "small",
    "Embedded": "embedded",
    "EmbeddingHead": "heads",
    "L2Normalize": "heads",
    "PrototypicalLoss": "prototypes",
    "count_parameters": "heads",
    "torchvision_embedder": "backbones",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
