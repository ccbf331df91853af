"""Relational knowledge distillation for PyTorch Lightning: a small student learns the geometry of a big teacher.

The names below are loaded when they are first used, so that a loss or a metric costs no more than PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read
    from lightning_rkd.callbacks.distillation import RelationalDistillation
    from lightning_rkd.callbacks.pictures import Pictures
    from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
    from lightning_rkd.data.indices import with_indices
    from lightning_rkd.data.sampling import PKBatchSampler
    from lightning_rkd.losses.base import RelationalLoss
    from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
    from lightning_rkd.metrics.agreement import RelationalAgreement
    from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
    from lightning_rkd.module import DistillationModule
    from lightning_rkd.taps import Tap
    from lightning_rkd.teachers import CachedTeacher, EnsembleTeacher, Teacher

    __version__: str
else:  # what Python runs (PEP 562)
    _HOMES = {
        "CachedTeacher": "teachers",
        "DistillationModule": "module",
        "EmbeddingRetrieval": "metrics.retrieval",
        "EnsembleTeacher": "teachers",
        "PKBatchSampler": "data.sampling",
        "Pictures": "callbacks.pictures",
        "RKD": "losses.rkd",
        "RKDAngle": "losses.rkd",
        "RKDDistance": "losses.rkd",
        "RelationalAgreement": "metrics.agreement",
        "RelationalDistillation": "callbacks.distillation",
        "RelationalLoss": "losses.base",
        "RetrievalEvaluation": "callbacks.retrieval",
        "Tap": "taps",
        "Teacher": "teachers",
        "with_indices": "data.indices",
    }

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            value = version("lightning-rkd")
        elif name in _HOMES:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # asked once
        return value


__all__ = [
    "RKD",
    "CachedTeacher",
    "DistillationModule",
    "EmbeddingRetrieval",
    "EnsembleTeacher",
    "PKBatchSampler",
    "Pictures",
    "RKDAngle",
    "RKDDistance",
    "RelationalAgreement",
    "RelationalDistillation",
    "RelationalLoss",
    "RetrievalEvaluation",
    "Tap",
    "Teacher",
    "__version__",
    "with_indices",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
