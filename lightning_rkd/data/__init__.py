"""Data modules, P-by-K batches, batch transforms, and loaders that say which sample is which."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.data.augment import Augment
    from lightning_rkd.data.base import ImageDataModule
    from lightning_rkd.data.episodes import episode_sampler
    from lightning_rkd.data.folder import ImageFolderDataModule
    from lightning_rkd.data.glyphs import GlyphDataModule
    from lightning_rkd.data.images import AugmentedSubset, ImageSet
    from lightning_rkd.data.indices import IndexedBatch, with_indices
    from lightning_rkd.data.loader import ResumableLoader
    from lightning_rkd.data.mixup import MixUp
    from lightning_rkd.data.rotations import Rotations
    from lightning_rkd.data.sampling import Draw, PKBatchSampler
    from lightning_rkd.data.views import AugmentedViews

__all__ = [
    "Augment",
    "AugmentedSubset",
    "AugmentedViews",
    "Draw",
    "GlyphDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageSet",
    "IndexedBatch",
    "MixUp",
    "PKBatchSampler",
    "ResumableLoader",
    "Rotations",
    "episode_sampler",
    "with_indices",
]

_HOME = {
    "Augment": "augment",
    "AugmentedSubset": "images",
    "AugmentedViews": "views",
    "Draw": "sampling",
    "GlyphDataModule": "glyphs",
    "ImageDataModule": "base",
    "ImageFolderDataModule": "folder",
    "ImageSet": "images",
    "IndexedBatch": "indices",
    "MixUp": "mixup",
    "PKBatchSampler": "sampling",
    "ResumableLoader": "loader",
    "Rotations": "rotations",
    "episode_sampler": "episodes",
    "with_indices": "indices",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
