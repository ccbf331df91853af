"""Data modules, samplers, batch transforms, and loaders whose batches know their sample indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.data.datamodules.archived import OfficialDataModule as OfficialDataModule
    from lightning_rkd.data.datamodules.base import ImageDataModule as ImageDataModule
    from lightning_rkd.data.datamodules.cars import CarsDataModule as CarsDataModule
    from lightning_rkd.data.datamodules.cifar import CIFARDataModule as CIFARDataModule
    from lightning_rkd.data.datamodules.cub import CUBDataModule as CUBDataModule
    from lightning_rkd.data.datamodules.folder import ImageFolderDataModule as ImageFolderDataModule
    from lightning_rkd.data.datamodules.glyphs import GlyphDataModule as GlyphDataModule
    from lightning_rkd.data.datamodules.in_shop import InShopDataModule as InShopDataModule
    from lightning_rkd.data.datamodules.mini_imagenet import MiniImageNetDataModule as MiniImageNetDataModule
    from lightning_rkd.data.datamodules.omniglot import OmniglotDataModule as OmniglotDataModule
    from lightning_rkd.data.datamodules.online_products import OnlineProductsDataModule as OnlineProductsDataModule
    from lightning_rkd.data.datamodules.tiny_imagenet import TinyImageNetDataModule as TinyImageNetDataModule
    from lightning_rkd.data.datasets.files import ImageFiles as ImageFiles
    from lightning_rkd.data.datasets.images import AugmentedSubset as AugmentedSubset
    from lightning_rkd.data.datasets.images import ImageSet as ImageSet
    from lightning_rkd.data.datasets.images import QuerySubset as QuerySubset
    from lightning_rkd.data.indexing import IndexedBatch as IndexedBatch
    from lightning_rkd.data.indexing import with_indices as with_indices
    from lightning_rkd.data.resumable_loader import ResumableLoader as ResumableLoader
    from lightning_rkd.data.samplers.episodes import episode_sampler as episode_sampler
    from lightning_rkd.data.samplers.pk import Draw as Draw
    from lightning_rkd.data.samplers.pk import PKBatchSampler as PKBatchSampler
    from lightning_rkd.data.transforms.augment import Augment as Augment
    from lightning_rkd.data.transforms.crop import CentreCrop as CentreCrop
    from lightning_rkd.data.transforms.crop import Crop as Crop
    from lightning_rkd.data.transforms.mixup import MixUp as MixUp
    from lightning_rkd.data.transforms.teacher import Renormalize as Renormalize
    from lightning_rkd.data.transforms.teacher import Resize as Resize
    from lightning_rkd.data.transforms.views import AugmentedViews as AugmentedViews
    from lightning_rkd.data.transforms.views import Rotations as Rotations

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
