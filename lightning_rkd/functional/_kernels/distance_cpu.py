"""Squared distances on the CPU and their backward pass, compiled with numba.

The matrix products are compiled too: a symmetric one is half the work, and PyTorch's threads, which hold the cores for
a while after their work, are not started.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.functional._kernels.jit import compiled
from lightning_rkd.functional._kernels.threads import in_ranges, shares

_PRODUCTS = 4_000_000  # multiplications that are worth a thread
SMALL = 2 * _PRODUCTS  # those of a network up to which calls of the parts one by one cost more than threads save
_TILE = 96  # rows that stay in a core's cache while others pass; a multiple of 3

_Array = np.ndarray


def squared(x: Tensor, duplicate: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Squared distances, 0 where they are at most ``duplicate`` times the squared norms, and what ``pulled`` takes."""
    distances, rows = measure(as_array(x), duplicate)
    return torch.from_numpy(distances), (torch.from_numpy(rows),)


def pulled(pull: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows from the gradient of their squared distances."""
    return torch.from_numpy(pull_rows(pull.detach().to(torch.float64).contiguous().numpy(), rows.numpy()))


def as_array(x: Tensor) -> _Array:
    """Rows in single or double precision, one after the other."""
    x = x.detach()
    array: _Array = (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous().numpy()
    return array


def measure(given: _Array, duplicate: float) -> tuple[_Array, _Array]:
    """Squared distances and centred rows."""
    n, width = given.shape
    rows, gram = np.empty((n, width)), np.empty((n, n))
    smallest = 2 * _PRODUCTS // max(1, n * width) + 1
    parts = shares(n, smallest) if n >= 2 * smallest else 1
    if parts == 1:
        _measure(given, rows, gram, duplicate)
    else:
        _centre(given, rows)
        in_ranges(lambda part, start, stop: _gram(rows, gram, part, parts), parts, parts)
        _from_lower(gram, duplicate)
    return gram, rows


def pull_rows(pull: _Array, rows: _Array) -> _Array:
    """Gradient of rows from the gradient of their squared distances, as arrays."""
    n, width = rows.shape
    laplacian, out = np.empty((n, n)), np.zeros((n, width))
    smallest = _PRODUCTS // max(1, n * width) + 1
    parts = shares(n, smallest) if n >= 2 * smallest else 1
    if parts == 1:
        _pull_rows(pull, rows, laplacian, out)
    else:
        _laplacian(pull, laplacian)
        in_ranges(lambda part, start, stop: _product(laplacian, rows, out, start, stop), n, parts)
    return out


@compiled("f2 d2")
def _centre(x: _Array, rows: _Array) -> None:
    n, width = x.shape
    mean = np.zeros(width)
    for i in range(n):
        for d in range(width):
            mean[d] += x[i, d]
    mean /= n
    for i in range(n):
        for d in range(width):
            rows[i, d] = x[i, d] - mean[d]


@compiled("d2 d2 i0 i0")
def _gram(x: _Array, out: _Array, part: int, parts: int) -> None:
    """Inner products of rows with earlier rows and themselves; every ``parts``-th four of them."""
    n, width = x.shape
    for first in range(0, n, _TILE):
        for i in range(first // 4 * 4, n, 4):
            if i // 4 % parts != part:
                continue
            k, last = first, min(first + _TILE, i + 4, n)
            if i + 4 <= n:
                x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
                while k + 3 <= last:
                    y0, y1, y2 = x[k], x[k + 1], x[k + 2]
                    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = 0.0
                    for d in range(width):
                        s00 += x0[d] * y0[d]
                        s01 += x0[d] * y1[d]
                        s02 += x0[d] * y2[d]
                        s10 += x1[d] * y0[d]
                        s11 += x1[d] * y1[d]
                        s12 += x1[d] * y2[d]
                        s20 += x2[d] * y0[d]
                        s21 += x2[d] * y1[d]
                        s22 += x2[d] * y2[d]
                        s30 += x3[d] * y0[d]
                        s31 += x3[d] * y1[d]
                        s32 += x3[d] * y2[d]
                    out[i, k], out[i, k + 1], out[i, k + 2] = s00, s01, s02
                    out[i + 1, k], out[i + 1, k + 1], out[i + 1, k + 2] = s10, s11, s12
                    out[i + 2, k], out[i + 2, k + 1], out[i + 2, k + 2] = s20, s21, s22
                    out[i + 3, k], out[i + 3, k + 1], out[i + 3, k + 2] = s30, s31, s32
                    k += 3
            for row in range(i, min(i + 4, n)):
                for column in range(k, last):
                    total = 0.0
                    for d in range(width):
                        total += x[row, d] * x[column, d]
                    out[row, column] = total


@compiled("d2 d0")
def _from_lower(gram: _Array, duplicate: float) -> None:
    n = len(gram)
    norms = np.empty(n)
    for i in range(n):
        norms[i] = gram[i, i]
    for i in range(n):
        for k in range(i):
            both = norms[i] + norms[k]
            distance = both - 2 * gram[i, k]
            gram[i, k] = gram[k, i] = 0.0 if distance <= duplicate * both else distance
        gram[i, i] = 0.0


@compiled("f2 d2 d2 d0")
def _measure(x: _Array, rows: _Array, gram: _Array, duplicate: float) -> None:
    """Centred rows and their squared distances, on one thread."""
    _centre(x, rows)
    _gram(rows, gram, 0, 1)
    _from_lower(gram, duplicate)


@compiled("d2 d2 d0 d2")
def distance_terms(student: _Array, teacher: _Array, factor: float, pull: _Array) -> float:
    """Same as :func:`lightning_rkd.functional.distances.distance_terms`; ``pull`` is filled, unless it is empty."""
    n = len(student)
    units = np.empty((2, n, n))  # distances in units of their mean
    total = inverse = 0.0
    for network in (1, 0):
        squared, total, positive, inverse = student if network == 0 else teacher, 0.0, 0.0, 0.0
        for i in range(n):
            for k in range(n):
                root = np.sqrt(squared[i, k])
                units[network, i, k] = root
                total += root
                positive += 1.0 if root > 0 else 0.0
        if total != 0:
            inverse = positive / total
        for i in range(n):
            for k in range(n):
                units[network, i, k] *= inverse
    loss = along = 0.0
    for i in range(n):
        for k in range(n):
            e = units[0, i, k] - units[1, i, k]
            g = 1.0 if e > 1 else e
            g = -1.0 if g < -1 else g
            units[1, i, k] = g
            loss += g * (e - 0.5 * g)
            along += g * units[0, i, k]
    scale = 0.5 * factor * inverse * inverse
    by_mean = 0.0 if total == 0 else along * scale / (total * inverse)
    for i in range(len(pull)):
        for k in range(n):
            unit = units[0, i, k]
            pull[i, k] = 0.0 if unit == 0 else (units[1, i, k] * scale - by_mean) / unit
    return factor * loss


@compiled("f2 f2 d0 d0 d2 d2 d2 d2")
def relate(
    student: _Array,
    teacher: _Array,
    duplicate: float,
    factor: float,
    own: _Array,
    given: _Array,
    rows: _Array,
    pull: _Array,
) -> float:
    """Both networks' squared distances, the student's centred rows, and the :func:`distance_terms`, on one thread."""
    _measure(student, rows, own, duplicate)
    _measure(teacher, np.empty(teacher.shape), given, duplicate)
    return distance_terms(own, given, factor, pull) if factor != 0 else 0.0


@compiled("d2 d2")
def _laplacian(pull: _Array, result: _Array) -> None:
    """Matrix whose product with the rows is their gradient, from the gradient of their squared distances."""
    n = len(pull)
    for i in range(n):
        total = 0.0
        for k in range(n):
            both = 2 * (pull[i, k] + pull[k, i])
            total += both
            result[i, k] = -both
        result[i, i] += total


@compiled("d2 d2 d2 i0 i0")
def _product(a: _Array, x: _Array, out: _Array, start: int, stop: int) -> None:
    """Add some rows of the product of two matrices."""
    n, width = x.shape
    for i in range(start, stop, 2):
        both = i + 1 < stop
        j = i + 1 if both else i
        out0, out1, k = out[i], out[j], 0
        while both and k + 4 <= n:
            a0, a1, a2, a3 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
            b0, b1, b2, b3 = a[j, k], a[j, k + 1], a[j, k + 2], a[j, k + 3]
            x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
            for d in range(width):
                out0[d] += a0 * x0[d] + a1 * x1[d] + a2 * x2[d] + a3 * x3[d]
                out1[d] += b0 * x0[d] + b1 * x1[d] + b2 * x2[d] + b3 * x3[d]
            k += 4
        for row in range(i, j + 1):
            for column in range(k, n):
                for d in range(width):
                    out[row, d] += a[row, column] * x[column, d]


@compiled("d2 d2 d2 d2")
def _pull_rows(pull: _Array, rows: _Array, laplacian: _Array, out: _Array) -> None:
    """Gradient of rows, on one thread."""
    _laplacian(pull, laplacian)
    _product(laplacian, rows, out, 0, len(rows))
