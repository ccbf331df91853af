"""The losses, one paper a file. Importing them costs no more than PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.losses.anchored_rkd import AnchoredRKD as AnchoredRKD
    from lightning_rkd.losses.attention_transfer import AttentionTransfer as AttentionTransfer
    from lightning_rkd.losses.base import NonFiniteError as NonFiniteError
    from lightning_rkd.losses.base import Reference as Reference
    from lightning_rkd.losses.base import RelationalLoss as RelationalLoss
    from lightning_rkd.losses.correlation_congruence import CorrelationCongruence as CorrelationCongruence
    from lightning_rkd.losses.crcd import CRCD as CRCD
    from lightning_rkd.losses.crd import CRD as CRD
    from lightning_rkd.losses.csd import CSD as CSD
    from lightning_rkd.losses.cskd import ClassSimilarityKD as ClassSimilarityKD
    from lightning_rkd.losses.cskd import CosineTemperatureKD as CosineTemperatureKD
    from lightning_rkd.losses.d3 import D3 as D3
    from lightning_rkd.losses.dark_rank import HardDarkRank as HardDarkRank
    from lightning_rkd.losses.dark_rank import SoftDarkRank as SoftDarkRank
    from lightning_rkd.losses.dcd import DCD as DCD
    from lightning_rkd.losses.dist import DIST as DIST
    from lightning_rkd.losses.ega import EGA as EGA
    from lightning_rkd.losses.embed_distill import EmbedDistill as EmbedDistill
    from lightning_rkd.losses.fitnet import FitNetHint as FitNetHint
    from lightning_rkd.losses.gram_anchoring import GramAnchoring as GramAnchoring
    from lightning_rkd.losses.graph_kd import GraphKD as GraphKD
    from lightning_rkd.losses.holistic import HolisticKD as HolisticKD
    from lightning_rkd.losses.ickd import ICKD as ICKD
    from lightning_rkd.losses.irg import IRG as IRG
    from lightning_rkd.losses.itrd import ITRD as ITRD
    from lightning_rkd.losses.matryoshka import Matryoshka as Matryoshka
    from lightning_rkd.losses.mhgd import MHGD as MHGD
    from lightning_rkd.losses.multi_level_logit import MultiLevelLogit as MultiLevelLogit
    from lightning_rkd.losses.nst import NST as NST
    from lightning_rkd.losses.pckd import PCKD as PCKD
    from lightning_rkd.losses.pkt import PKT as PKT
    from lightning_rkd.losses.raml import RAML as RAML
    from lightning_rkd.losses.regression import Regression as Regression
    from lightning_rkd.losses.relative_similarity import RelativeSimilarity as RelativeSimilarity
    from lightning_rkd.losses.relaxed_contrastive import RelaxedContrastive as RelaxedContrastive
    from lightning_rkd.losses.rkd import RKD as RKD
    from lightning_rkd.losses.rkd import RKDAngle as RKDAngle
    from lightning_rkd.losses.rkd import RKDDistance as RKDDistance
    from lightning_rkd.losses.rop import ROP as ROP
    from lightning_rkd.losses.rrd import RRD as RRD
    from lightning_rkd.losses.sample_contrastive import SampleContrastiveKD as SampleContrastiveKD
    from lightning_rkd.losses.similarity_preserving import SimilarityPreserving as SimilarityPreserving
    from lightning_rkd.losses.skd import SKDDirection as SKDDirection
    from lightning_rkd.losses.soft_target import SoftTarget as SoftTarget
    from lightning_rkd.losses.srd import SRD as SRD
    from lightning_rkd.losses.stkd import STKD as STKD
    from lightning_rkd.losses.token_similarity import TokenSimilarity as TokenSimilarity
    from lightning_rkd.losses.ttm import TTM as TTM
    from lightning_rkd.losses.ttm import WTTM as WTTM
    from lightning_rkd.losses.vkd import VkD as VkD
    from lightning_rkd.losses.weighting import LossSum as LossSum

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
