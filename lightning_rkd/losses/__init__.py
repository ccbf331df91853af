"""The losses, one paper a file. Importing them costs no more than PyTorch."""

from lightning_rkd.losses.base import LossSum, NonFiniteError, RelationalLoss, Term
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance

__all__ = ["RKD", "LossSum", "NonFiniteError", "RKDAngle", "RKDDistance", "RelationalLoss", "Term"]
