"""PHI standardisation of embeddings (Ranzinger et al. 2024): one scale, and equal variance in every column."""

import math
from functools import reduce

import torch
from torch import Tensor

from lightning_rkd.functional.scales import centre_columns, to_float64


def phi_standardisation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean, and the matrix that rotates and scales centred embeddings so that every column has variance 1.

    .. math::
        x \mapsto \varphi^{-1} H U^\top (x - \mu), \qquad
        \operatorname{cov}(x) = U \Lambda U^\top, \quad \varphi^2 = \frac{1}{D} \sum_d \Lambda_d

    with an orthogonal Hadamard matrix H (:func:`hadamard_matrix`). All distances are divided by the same
    :math:`\varphi`, so that relations within one embedding stay as they are, and embeddings of several networks weigh
    alike.

    Shapes: (N, D) -> (D,), (D, D), float64 (float32 on MPS); apply as ``(x - mean) @ matrix.T``.

    Reference:
        Ranzinger, Barker, Heinrich, Molchanov, Catanzaro and Tao 2024, PHI-S: Distribution Balancing for Label-Free
        Multi-Teacher Distillation, arXiv:2410.01680.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 2.0], [6.0, 2.0]], dtype=torch.float64)
        >>> mean, matrix = phi_standardisation(x)
        >>> mean, ((x - mean) @ matrix.T).var(0).round(decimals=6)
        (tensor([3., 1.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    rows = centre_columns(embeddings)
    if len(rows) < 2 or not rows.any():
        raise ValueError(f"phi_standardisation: expected at least two rows that differ, got {len(rows)} equal ones")
    variances, directions = torch.linalg.eigh(rows.T @ rows / (len(rows) - 1))
    hadamard = hadamard_matrix(rows.shape[1]).to(rows)
    return to_float64(embeddings).mean(0), hadamard @ directions.T / variances.clamp(min=0).mean().sqrt()


def hadamard_matrix(n: int) -> Tensor:
    r"""Orthogonal matrix whose entries are all :math:`\pm n^{-1/2}`, where one can be constructed.

    Sylvester's and Paley's constructions and their products cover nearly all multiples of 4 that are widths of
    networks. For other n, Q of the QR decomposition of a matrix of random signs, always the same one, stands for it,
    as in the code of PHI-S; entries, and with them variances, are then only about equal.

    Shapes: -> (n, n), float64.

    Example:
        >>> hadamard_matrix(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    doubled = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for power in reversed(range((n & -n).bit_length())):  # the powers of two that divide n
        if (signs := _paley(n >> power)) is not None:
            matrix: Tensor = reduce(lambda block, _: torch.kron(doubled, block), range(power), signs)
            return matrix / math.sqrt(n)
    random = torch.randint(2, (n, n), generator=torch.Generator().manual_seed(n)).double() * 2 - 1
    rotation: Tensor = torch.linalg.qr(random).Q
    return rotation


def _paley(n: int) -> Tensor | None:
    """Hadamard matrix of order 1 or q + 1, or 2 (q + 1), for a prime q that is 3, or 1, modulo 4."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for q, kind in ((n - 1, 3), (n // 2 - 1, 1)):
        if q % 4 != kind or (kind == 1 and n % 2) or q < 3 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
            continue
        character = -torch.ones(q, dtype=torch.float64)
        character[torch.arange(1, q).square() % q] = 1
        character[0] = 0
        index = torch.arange(q)
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, 2.0 - kind  # symmetric for 1, skew for 3
        core[1:, 1:] = character[(index[:, None] - index) % q]
        if kind == 3:
            return core + torch.eye(q + 1, dtype=torch.float64)
        diagonal = torch.eye(q + 1, dtype=torch.float64)
        ones, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(core, ones.double()) + torch.kron(diagonal, other.double())
    return None
