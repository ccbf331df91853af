"""Methods whose source could not be read in full: reconstructions that keep the contract of the other losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.experimental.aicsd import AICSD as AICSD
    from lightning_rkd.experimental.aicsd import AdaptiveWeight as AdaptiveWeight
    from lightning_rkd.experimental.corsd import CORSD as CORSD
    from lightning_rkd.experimental.online_branches import OnlineBranches as OnlineBranches
    from lightning_rkd.experimental.residual_kd import ResidualKD as ResidualKD
    from lightning_rkd.experimental.tanimoto import Tanimoto as Tanimoto

_HOMES = {
    "AICSD": "aicsd",
    "AdaptiveWeight": "aicsd",
    "CORSD": "corsd",
    "OnlineBranches": "online_branches",
    "ResidualKD": "residual_kd",
    "Tanimoto": "tanimoto",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)

__all__ = [
    "AICSD",
    "CORSD",
    "AdaptiveWeight",
    "OnlineBranches",
    "ResidualKD",
    "Tanimoto",
]
