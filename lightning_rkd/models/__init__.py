"""Networks: small ones for images, texts and vectors, those of other packages with an embedding head, prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.models.backbones import timm_embedder as timm_embedder
    from lightning_rkd.models.backbones import torchvision_embedder as torchvision_embedder
    from lightning_rkd.models.cifar import CIFARVGG as CIFARVGG
    from lightning_rkd.models.cifar import CIFARResNet as CIFARResNet
    from lightning_rkd.models.cifar import CIFARWideResNet as CIFARWideResNet
    from lightning_rkd.models.heads import Classified as Classified
    from lightning_rkd.models.heads import Embedded as Embedded
    from lightning_rkd.models.heads import EmbeddingHead as EmbeddingHead
    from lightning_rkd.models.heads import L2Normalize as L2Normalize
    from lightning_rkd.models.heads import count_parameters as count_parameters
    from lightning_rkd.models.prototypes import PrototypicalLoss as PrototypicalLoss
    from lightning_rkd.models.small import Conv4 as Conv4
    from lightning_rkd.models.small import ConvNet as ConvNet
    from lightning_rkd.models.text import HashedText as HashedText
    from lightning_rkd.models.transformer import TransformerEncoder as TransformerEncoder
    from lightning_rkd.models.vectors import VectorMLP as VectorMLP

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
