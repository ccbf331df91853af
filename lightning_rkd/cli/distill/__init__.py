"""Distillation of a pretrained teacher on data of one's own: ``lightning-rkd distill``."""

from lightning_rkd.cli.distill.run import Distilled, distill
from lightning_rkd.cli.distill.samples import Samples

__all__ = ["Distilled", "Samples", "distill"]
