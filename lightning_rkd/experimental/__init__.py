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

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
