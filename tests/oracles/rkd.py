"""RKD as written in the paper: plain loops over pairs and triplets, and the authors' tensor formulas in autograd."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def huber(e: float) -> float:
    return 0.5 * e * e if abs(e) <= 1 else abs(e) - 0.5


def rkd_distance(student: np.ndarray, teacher: np.ndarray, reduction: str = "official") -> float:
    """RKD-D of float64 arrays."""

    def potentials(x: np.ndarray) -> list[list[float]]:
        n = len(x)
        d = [[math.dist(x[i], x[j]) for j in range(n)] for i in range(n)]
        positive = [v for row in d for v in row if v > 0]
        mu = sum(positive) / len(positive) if positive else 1.0
        return [[v / mu for v in row] for row in d]

    n, s, t = len(student), potentials(student), potentials(teacher)
    total = sum(huber(s[i][j] - t[i][j]) for i in range(n) for j in range(n))
    return total / (n * n if reduction == "official" else max(1, n * (n - 1)))


def rkd_angle(student: np.ndarray, teacher: np.ndarray, reduction: str = "official") -> float:
    """RKD-A of float64 arrays; cosine 0 where the vertex coincides with another corner."""

    def cosine(x: np.ndarray, j: int, i: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / lengths if lengths > 0 else 0.0

    n, total = len(student), 0.0
    for j in range(n):
        for i in range(n):
            for k in range(n):
                if reduction == "official" or len({i, j, k}) == 3:
                    total += huber(cosine(student, j, i, k) - cosine(teacher, j, i, k))
    return total / (n**3 if reduction == "official" else max(1, n * (n - 1) * (n - 2)))


def formula_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D by differences, differentiable; no duplicates, please."""

    def potential(x: Tensor) -> Tensor:
        n = len(x)
        off = ~torch.eye(n, dtype=torch.bool)
        d = (x[:, None] - x[None])[off].norm(dim=1)
        return torch.zeros(n, n, dtype=x.dtype).masked_scatter(off, d / d.mean())

    return F.huber_loss(potential(student), potential(teacher).detach())


def formula_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A by unit differences and a batched product, differentiable."""

    def cosines(x: Tensor) -> Tensor:
        unit = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(unit, unit.transpose(1, 2))

    return F.huber_loss(cosines(student), cosines(teacher).detach())
