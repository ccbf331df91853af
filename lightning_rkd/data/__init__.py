"""Data modules, P-by-K batches, batch transforms, and loaders that say which sample is which."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.data.augment import Augment
    from lightning_rkd.data.base import ImageDataModule
    from lightning_rkd.data.cars import CarsDataModule
    from lightning_rkd.data.cifar import CIFARDataModule
    from lightning_rkd.data.crop import CentreCrop, Crop
    from lightning_rkd.data.cub import CUBDataModule
    from lightning_rkd.data.episodes import episode_sampler
    from lightning_rkd.data.files import ImageFiles
    from lightning_rkd.data.folder import ImageFolderDataModule
    from lightning_rkd.data.glyphs import GlyphDataModule
    from lightning_rkd.data.images import AugmentedSubset, ImageSet, QuerySubset
    from lightning_rkd.data.in_shop import InShopDataModule
    from lightning_rkd.data.indices import IndexedBatch, with_indices
    from lightning_rkd.data.loader import ResumableLoader
    from lightning_rkd.data.mini_imagenet import MiniImageNetDataModule
    from lightning_rkd.data.mixup import MixUp
    from lightning_rkd.data.official import OfficialDataModule
    from lightning_rkd.data.omniglot import OmniglotDataModule
    from lightning_rkd.data.online_products import OnlineProductsDataModule
    from lightning_rkd.data.rotations import Rotations
    from lightning_rkd.data.sampling import Draw, PKBatchSampler
    from lightning_rkd.data.tiny_imagenet import TinyImageNetDataModule
    from lightning_rkd.data.views import AugmentedViews

__all__ = [
    "Augment",
    "AugmentedSubset",
    "AugmentedViews",
    "CIFARDataModule",
    "CUBDataModule",
    "CarsDataModule",
    "CentreCrop",
    "Crop",
    "Draw",
    "GlyphDataModule",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageSet",
    "InShopDataModule",
    "IndexedBatch",
    "MiniImageNetDataModule",
    "MixUp",
    "OfficialDataModule",
    "OmniglotDataModule",
    "OnlineProductsDataModule",
    "PKBatchSampler",
    "QuerySubset",
    "ResumableLoader",
    "Rotations",
    "TinyImageNetDataModule",
    "episode_sampler",
    "with_indices",
]

_HOME = {
    "Augment": "augment",
    "AugmentedSubset": "images",
    "AugmentedViews": "views",
    "CIFARDataModule": "cifar",
    "CUBDataModule": "cub",
    "CarsDataModule": "cars",
    "CentreCrop": "crop",
    "Crop": "crop",
    "Draw": "sampling",
    "GlyphDataModule": "glyphs",
    "ImageDataModule": "base",
    "ImageFiles": "files",
    "ImageFolderDataModule": "folder",
    "ImageSet": "images",
    "InShopDataModule": "in_shop",
    "IndexedBatch": "indices",
    "MiniImageNetDataModule": "mini_imagenet",
    "MixUp": "mixup",
    "OfficialDataModule": "official",
    "OmniglotDataModule": "omniglot",
    "OnlineProductsDataModule": "online_products",
    "PKBatchSampler": "sampling",
    "QuerySubset": "images",
    "ResumableLoader": "loader",
    "Rotations": "rotations",
    "TinyImageNetDataModule": "tiny_imagenet",
    "episode_sampler": "episodes",
    "with_indices": "indices",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
