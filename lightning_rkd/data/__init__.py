"""Data modules on disjoint classes, P-by-K batches, and loaders that say which sample is which."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.data.augment import Augment
    from lightning_rkd.data.base import DisjointClassesDataModule
    from lightning_rkd.data.folder import ImageFolderDataModule
    from lightning_rkd.data.glyphs import GlyphDataModule
    from lightning_rkd.data.images import AugmentedSubset, ImageSet
    from lightning_rkd.data.indices import IndexedBatch, with_indices
    from lightning_rkd.data.loader import ResumableLoader
    from lightning_rkd.data.sampling import Draw, PKBatchSampler

__all__ = [
    "Augment",
    "AugmentedSubset",
    "DisjointClassesDataModule",
    "Draw",
    "GlyphDataModule",
    "ImageFolderDataModule",
    "ImageSet",
    "IndexedBatch",
    "PKBatchSampler",
    "ResumableLoader",
    "with_indices",
]

_HOME = {
    "Augment": "augment",
    "AugmentedSubset": "images",
    "DisjointClassesDataModule": "base",
    "Draw": "sampling",
    "GlyphDataModule": "glyphs",
    "ImageFolderDataModule": "folder",
    "ImageSet": "images",
    "IndexedBatch": "indices",
    "PKBatchSampler": "sampling",
    "ResumableLoader": "loader",
    "with_indices": "indices",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
