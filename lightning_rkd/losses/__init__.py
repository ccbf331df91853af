"""The losses, one paper a file. Importing them costs no more than PyTorch."""

from lightning_rkd.losses.attention_transfer import AttentionTransfer
from lightning_rkd.losses.base import NonFiniteError, Reference, RelationalLoss
from lightning_rkd.losses.correlation_congruence import CorrelationCongruence
from lightning_rkd.losses.crcd import CRCD
from lightning_rkd.losses.crd import CRD
from lightning_rkd.losses.cskd import ClassSimilarityKD, CosineTemperatureKD
from lightning_rkd.losses.dark_rank import HardDarkRank, SoftDarkRank
from lightning_rkd.losses.dist import DIST
from lightning_rkd.losses.embed_distill import EmbedDistill
from lightning_rkd.losses.fitnet import FitNetHint
from lightning_rkd.losses.graph_kd import GraphKD
from lightning_rkd.losses.holistic import HolisticKD
from lightning_rkd.losses.ickd import ICKD
from lightning_rkd.losses.irg import IRG
from lightning_rkd.losses.itrd import ITRD
from lightning_rkd.losses.mhgd import MHGD
from lightning_rkd.losses.nst import NST
from lightning_rkd.losses.pckd import PCKD
from lightning_rkd.losses.pkt import PKT
from lightning_rkd.losses.relaxed_contrastive import RelaxedContrastive
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.losses.rrd import RRD
from lightning_rkd.losses.sample_contrastive import SampleContrastiveKD
from lightning_rkd.losses.similarity_preserving import SimilarityPreserving
from lightning_rkd.losses.soft_target import SoftTarget
from lightning_rkd.losses.srd import SRD
from lightning_rkd.losses.stkd import STKD
from lightning_rkd.losses.ttm import TTM, WTTM
from lightning_rkd.losses.vkd import VkD
from lightning_rkd.losses.weighting import LossSum

__all__ = [
    "CRCD",
    "CRD",
    "DIST",
    "ICKD",
    "IRG",
    "ITRD",
    "MHGD",
    "NST",
    "PCKD",
    "PKT",
    "RKD",
    "RRD",
    "SRD",
    "STKD",
    "TTM",
    "WTTM",
    "AttentionTransfer",
    "ClassSimilarityKD",
    "CorrelationCongruence",
    "CosineTemperatureKD",
    "EmbedDistill",
    "FitNetHint",
    "GraphKD",
    "HardDarkRank",
    "HolisticKD",
    "LossSum",
    "NonFiniteError",
    "RKDAngle",
    "RKDDistance",
    "Reference",
    "RelationalLoss",
    "RelaxedContrastive",
    "SampleContrastiveKD",
    "SimilarityPreserving",
    "SoftDarkRank",
    "SoftTarget",
    "VkD",
]
