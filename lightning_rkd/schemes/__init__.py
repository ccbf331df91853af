"""Training schemes that are more than a loss, each a small LightningModule over the engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.schemes.corsd import CORSD
    from lightning_rkd.schemes.mhgd import AttentionGraphEstimator, MHGDModule
    from lightning_rkd.schemes.multihead import MultiHeadDistillation
    from lightning_rkd.schemes.online import OnlineBranches
    from lightning_rkd.schemes.residual import ResidualKD

__all__ = [
    "CORSD",
    "AttentionGraphEstimator",
    "MHGDModule",
    "MultiHeadDistillation",
    "OnlineBranches",
    "ResidualKD",
]

_HOME = {
    "AttentionGraphEstimator": "mhgd",
    "CORSD": "corsd",
    "MHGDModule": "mhgd",
    "MultiHeadDistillation": "multihead",
    "OnlineBranches": "online",
    "ResidualKD": "residual",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
