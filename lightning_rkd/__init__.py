"""Relational knowledge distillation for PyTorch Lightning: a small student learns the geometry of a big teacher.

Public names are loaded when they are first used, so that a loss or a metric alone imports little more than PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.callbacks.distillation import RelationalDistillation as RelationalDistillation
    from lightning_rkd.callbacks.figures import Pictures as Pictures
    from lightning_rkd.callbacks.retrieval import RetrievalEvaluation as RetrievalEvaluation
    from lightning_rkd.cli.distill.run import distill as distill
    from lightning_rkd.data.indexing import with_indices as with_indices
    from lightning_rkd.data.samplers.pk import PKBatchSampler as PKBatchSampler
    from lightning_rkd.distillation.distiller import Distiller as Distiller
    from lightning_rkd.distillation.layers import Tap as Tap
    from lightning_rkd.distillation.micro_batches import MicroBatches as MicroBatches
    from lightning_rkd.distillation.pooling import cls_token as cls_token
    from lightning_rkd.distillation.pooling import global_pool as global_pool
    from lightning_rkd.distillation.pooling import last_token_pool as last_token_pool
    from lightning_rkd.distillation.pooling import mean_pool as mean_pool
    from lightning_rkd.distillation.teachers import CachedTeacher as CachedTeacher
    from lightning_rkd.distillation.teachers import EnsembleTeacher as EnsembleTeacher
    from lightning_rkd.distillation.teachers import Teacher as Teacher
    from lightning_rkd.losses.base import RelationalLoss as RelationalLoss
    from lightning_rkd.losses.rkd import RKD as RKD
    from lightning_rkd.losses.rkd import RKDAngle as RKDAngle
    from lightning_rkd.losses.rkd import RKDDistance as RKDDistance
    from lightning_rkd.metrics.agreement import RelationalAgreement as RelationalAgreement
    from lightning_rkd.metrics.retrieval import EmbeddingRetrieval as EmbeddingRetrieval
    from lightning_rkd.modules.distillation import DistillationModule as DistillationModule
    from lightning_rkd.utils.types import Batch as Batch
    from lightning_rkd.utils.types import Outputs as Outputs

    __version__: str

_load, _, __all__ = lazy_attributes(__name__)
__all__ = sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lightning-rkd")
    else:
        value = _load(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
