"""Similarities between the tokens of an image, on the teacher's grid."""

from math import isqrt, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import RelationalLoss


class TokenLoss(RelationalLoss):
    """Base of losses on the cosines between the tokens of each image, summed over pairs of feature maps.

    The student's grid is interpolated to the teacher's where they differ. A subclass defines :meth:`compare`.
    """

    reads = "feature_maps"
    gather = False
    invariances = frozenset({"scale", "row scale"})

    def __init__(self, student_prefix: int = 0, teacher_prefix: int = 0, feature_maps: list[int] | None = None) -> None:
        super().__init__()
        self.student_prefix, self.teacher_prefix, self.feature_maps = student_prefix, teacher_prefix, feature_maps

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of cosines (N, T, T), (N, T, T)."""
        raise NotImplementedError

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([self.compare(*map(token_cosines, self._on_one_grid(s, t))) for s, t in pairs]).sum()

    def _on_one_grid(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, C) of both networks, the student's interpolated to the teacher's grid."""
        s, t = self._patches(student, "student"), self._patches(teacher, "teacher")
        if s.shape[-2:] != t.shape[-2:] if s.ndim == t.ndim == 4 else _count(s) != _count(t):
            s = F.interpolate(self._grid(s, "student"), self._grid(t, "teacher").shape[2:], mode="bilinear")
        return tuple(x.flatten(2).mT if x.ndim == 4 else x for x in (s, t))  # type: ignore[return-value]

    def _patches(self, x: Tensor, network: str) -> Tensor:
        """A map (N, C, H, W), or tokens (N, T, C) without those at the front."""
        prefix: int = getattr(self, f"{network}_prefix")
        if x.ndim == 3 and x.shape[1] > prefix:
            return x[:, prefix:]
        if x.ndim == 4:
            return x
        raise ValueError(
            f"{self.display_name}: the {network}'s layer must give tokens (N, T, C), more than "
            f"{network}_prefix={prefix}, or a map (N, C, H, W), got {tuple(x.shape)}"
        )

    def _grid(self, x: Tensor, network: str) -> Tensor:
        """A map (N, C, H, W), of tokens that fill a square."""
        if x.ndim == 4:
            return x
        edge = isqrt(x.shape[1])
        if edge**2 != x.shape[1]:
            raise ValueError(
                f"{self.display_name}: student and teacher have different numbers of tokens, and the {network}'s "
                f"{x.shape[1]} are no square grid that could be interpolated; leave out class and register tokens by "
                f"{network}_prefix, or tap a layer that gives a map (N, C, H, W)"
            )
        return x.mT.reshape(len(x), -1, edge, edge)


def _count(x: Tensor) -> int:
    return prod(x.shape[2:]) if x.ndim == 4 else x.shape[1]


def token_cosines(tokens: Tensor) -> Tensor:
    """Cosines between the tokens of each image, (N, T, C) -> (N, T, T); 0 for tokens of zeros."""
    unit = unit_rows(tokens.flatten(0, 1)).view_as(tokens)
    return unit @ unit.mT
