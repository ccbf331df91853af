"""LightningModules: distillation, and training schemes that are more than a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.modules.distillation import DistillationModule as DistillationModule
    from lightning_rkd.modules.mhgd import AttentionGraphEstimator as AttentionGraphEstimator
    from lightning_rkd.modules.mhgd import MHGDModule as MHGDModule
    from lightning_rkd.modules.multihead import MultiHeadDistillation as MultiHeadDistillation

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
