"""Networks: small ones for the recipes, torchvision's with an embedding head, heads, and what trains prototypes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.models.backbones import torchvision_embedder
    from lightning_rkd.models.classified import Classified
    from lightning_rkd.models.heads import EmbeddingHead, L2Normalize, count_parameters
    from lightning_rkd.models.prototypes import PrototypicalLoss
    from lightning_rkd.models.small import ConvNet

__all__ = [
    "Classified",
    "ConvNet",
    "EmbeddingHead",
    "L2Normalize",
    "PrototypicalLoss",
    "count_parameters",
    "torchvision_embedder",
]

_HOME = {
    "Classified": "classified",
    "ConvNet": "small",
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
