r"""RKD's angle loss on the CPU: loss and gradient of all triplets in one pass, compiled with numba.

With :math:`r_{jk} = 1 / d_{jk}` the law of cosines reads
:math:`\cos(j; i, k) = \tfrac12 r_{ji} \big((S_{ji} - S_{ik}) r_{jk} + d_{jk}\big)`: a few multiplications and additions
on rows of matrices, which vector units do for 8 or 16 triplets at a time. Pairs that are too close for float32 are left
out of that pass and computed in float64 in a second one.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.functional._kernels.jit import compiled
from lightning_rkd.functional._kernels.threads import in_ranges, shares
from lightning_rkd.functional.angle_tiles import NEAR

_SQUARE = range(24, 200)  # batch sizes for which all triplets in long loops are faster than half of them in short ones
_TRIPLETS = 4_000_000  # least share of a thread: PyTorch's threads hold the cores for a while after their own work
_ROWS, _COLUMNS = 128, 512  # tile of three matrices that stays in a core's cache

_Array = np.ndarray


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    vertices: tuple[int, int],
    dtype: torch.dtype,
    *,
    official: bool,
    factor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments and results as :func:`lightning_rkd.functional.angle_tiles.loss_and_gradient`, in float64."""
    own, given = (x.detach().to(torch.float64).contiguous().numpy() for x in (student, teacher))
    gradient = np.zeros(own.shape if with_gradient else (0, 0))
    total = angle_terms(own, given, vertices, dtype, official, factor, gradient)
    return torch.tensor(total, dtype=torch.float64), torch.from_numpy(gradient) if with_gradient else None


def angle_terms(
    squared_s: _Array,
    squared_t: _Array,
    vertices: tuple[int, int],
    dtype: torch.dtype,
    official: bool,
    factor: float,
    gradient: _Array,
) -> float:
    """The same as :func:`loss_and_gradient`, of arrays; the gradient is added to ``gradient``, unless that is empty."""
    n, kind = len(squared_s), np.float64 if dtype == torch.float64 else np.float32
    start, stop = vertices
    smallest = _TRIPLETS // max(1, n * n)
    parts = 1 if stop - start < 2 * smallest else shares(stop - start, smallest)
    networks = np.empty((2, 3, n, n), kind)  # squared distances, their inverse roots, their roots
    units = np.empty((2, 4))  # mean, largest, number of zeros, number of near pairs

    if parts == 1:
        _prepare(squared_s, squared_t, NEAR, 0, 2, networks, units)
    else:
        in_ranges(lambda _, first, last: _prepare(squared_s, squared_t, NEAR, first, last, networks, units), 2, 2)
    (own, given), (mean, _, zeros_s, near_s), (_, _, zeros_t, near_t) = networks, *units.tolist()
    near, exact = _NONE, _NO_PARTS
    if kind is np.float32 and near_s + near_t > 0:
        limits = NEAR * units[:, 1]
        near = ((squared_s > 0) & (squared_s < limits[0])) | ((squared_t > 0) & (squared_t < limits[1]))
        networks[:, 1:, near] = 0  # their cosines are 0 in both networks
        exact = np.zeros((parts, n, n))
    totals, alone = np.zeros(parts), 0.0
    if official and (zeros_s > n or zeros_t > n):  # duplicates in one network only
        alone = 0.5 * float(((squared_s[start:stop] > 0) != (squared_t[start:stop] > 0)).sum())
    across = np.zeros((parts, n, n), kind)  # gradient to the distance opposite the vertex, summed over vertices
    at = np.zeros((2, n, n), kind)  # gradient to the distances at the vertex, through the weight and the cosine
    terms, twice = (_all_terms, 1.0) if n in _SQUARE else (_half_terms, 2.0)

    def add_terms(part: int, first: int, last: int) -> None:
        totals[part] = terms(own, given, start + first, start + last, across[part], at)
        if len(near):
            totals[part] += _near_terms(squared_s, squared_t, units, near, start + first, start + last, exact[part])

    def put_together(part: int, first: int, last: int) -> None:
        _put_together(across, twice, at, exact, squared_s, mean, factor, first, last, gradient)

    if parts == 1:
        add_terms(0, 0, stop - start)
    else:
        in_ranges(add_terms, stop - start, parts)
    if len(gradient) and parts == 1:
        put_together(0, 0, n)
    elif len(gradient):
        in_ranges(put_together, n, parts)
    return factor * (2 * float(totals.sum()) + alone)


_NONE, _NO_PARTS = np.zeros((0, 0), bool), np.zeros((1, 0, 0))


@compiled("d2 d0 f3 d1")
def _in_units_of_mean(squared: _Array, part: float, network: _Array, unit: _Array) -> None:
    """Squared distances divided by their mean, which keeps float32 in range, inverse roots (0 for 0), and roots."""
    n, total, zeros, near = len(squared), 0.0, 0, 0
    largest = np.zeros(n)  # in every column, as vector units do it
    for i in range(n):
        for k in range(n):
            value = squared[i, k]
            total += value
            zeros += value == 0
            largest[k] = value if value > largest[k] else largest[k]
    most = largest.max()
    limit = part * most
    mean = max(total / (n * n), 2.3e-308) if total == total else total
    for i in range(n):
        for k in range(n):
            value = squared[i, k] / mean
            root = np.sqrt(value)
            network[0, i, k] = value
            network[1, i, k] = 0.0 if value == 0 else 1 / root
            network[2, i, k] = root
            near += (squared[i, k] > 0) & (squared[i, k] < limit)
    unit[0], unit[1], unit[2], unit[3] = mean, most, zeros, near


@compiled("d2 d2 d0 i0 i0 f4 d2")
def _prepare(
    student: _Array, teacher: _Array, part: float, first: int, last: int, networks: _Array, units: _Array
) -> None:
    """:func:`_in_units_of_mean` of the student (0), the teacher (1), or both."""
    for network in range(first, last):
        _in_units_of_mean(teacher if network else student, part, networks[network], units[network])


@compiled("f3 f3 i0 i0 f2 f3")
def _all_terms(student: _Array, teacher: _Array, start: int, stop: int, across: _Array, at: _Array) -> float:
    """All triplets, both (j, i, k) and (j, k, i), over whole rows."""
    s, rs, ds = student[0], student[1], student[2]
    t, rt, dt = teacher[0], teacher[1], teacher[2]
    n, total = len(s), 0.0
    one, half = s.dtype.type(1), s.dtype.type(0.5)
    for j in range(start, stop):
        sj, rsj, dsj, tj, rtj, dtj = s[j], rs[j], ds[j], t[j], rt[j], dt[j]
        for i in range(n):
            si, ti, pull = s[i], t[i], across[i]
            a, b, h, q = sj[i], tj[i], rsj[i] * half, rtj[i] * half
            weight = cosine = loss = s.dtype.type(0)
            for k in range(n):
                c = h * ((a - si[k]) * rsj[k] + dsj[k])
                e = c - q * ((b - ti[k]) * rtj[k] + dtj[k])
                g = one if e > one else e
                g = -one if g < -one else g
                loss += g * (e - half * g)
                gr = g * rsj[k]
                pull[k] -= h * gr
                weight += gr
                cosine += c * g
            if (rsj[i] == 0) != (rtj[i] == 0):  # at k = i both cosines are 1, and cancel, but not here
                c = h * (a * rsj[i] + dsj[i])
                g = c - q * (b * rtj[i] + dtj[i])
                loss -= half * g * g
                gr = g * rsj[i]
                pull[i] += h * gr
                weight -= gr
                cosine -= c * g
            total += loss
            at[0, j, i] = weight * h
            at[1, j, i] = cosine
    return 0.5 * total


@compiled("f3 f3 i0 i0 f2 f3")
def _half_terms(student: _Array, teacher: _Array, start: int, stop: int, across: _Array, at: _Array) -> float:
    """Triplets with k < i, which stand for their mirror images too, tile by tile."""
    s, rs, ds = student[0], student[1], student[2]
    t, rt, dt = teacher[0], teacher[1], teacher[2]
    n, total = len(s), 0.0
    one, half = s.dtype.type(1), s.dtype.type(0.5)
    for first_k in range(0, n, _COLUMNS):
        last_k = min(first_k + _COLUMNS, n)
        for first_i in range(first_k, n, _ROWS):
            for j in range(start, stop):
                rsj, dsj = rs[j, first_k:last_k], ds[j, first_k:last_k]
                rtj, dtj = rt[j, first_k:last_k], dt[j, first_k:last_k]
                weights, cosines = at[0, j, first_k:last_k], at[1, j, first_k:last_k]
                for i in range(first_i, min(first_i + _ROWS, n)):
                    si, ti, pull = s[i, first_k:last_k], t[i, first_k:last_k], across[i, first_k:last_k]
                    a, b, h, q = s[j, i], t[j, i], rs[j, i] * half, rt[j, i] * half
                    weight = cosine = loss = s.dtype.type(0)
                    for k in range(min(i, last_k) - first_k):
                        c = h * ((a - si[k]) * rsj[k] + dsj[k])
                        e = c - q * ((b - ti[k]) * rtj[k] + dtj[k])
                        g = one if e > one else e
                        g = -one if g < -one else g
                        loss += g * (e - half * g)
                        w = h * g * rsj[k]
                        cg = c * g
                        pull[k] -= w
                        weight += w
                        cosine += cg
                        weights[k] += w
                        cosines[k] += cg
                    total += loss
                    at[0, j, i] += weight
                    at[1, j, i] += cosine
    return total


@compiled("d2 d2 d2 b2 i0 i0 d2")
def _near_terms(
    squared_s: _Array, squared_t: _Array, units: _Array, near: _Array, start: int, stop: int, gradient: _Array
) -> float:
    """Triplets in which a corner is near the vertex, with their gradient."""
    n, total, mean_s, mean_t = len(near), 0.0, units[0, 0], units[1, 0]
    for j in range(start, stop):
        for k in range(n):
            if not near[j, k]:
                continue
            s_jk, t_jk = squared_s[j, k] / mean_s, squared_t[j, k] / mean_t
            for i in range(n):
                if i == k or (near[j, i] and i > k):
                    continue
                s_ji, t_ji = squared_s[j, i] / mean_s, squared_t[j, i] / mean_t
                w = 0.5 / np.sqrt(s_ji * s_jk) if s_ji * s_jk > 0 else 0.0
                c = (s_ji + s_jk - squared_s[i, k] / mean_s) * w
                e = c - (
                    (t_ji + t_jk - squared_t[i, k] / mean_t) * 0.5 / np.sqrt(t_ji * t_jk) if t_ji * t_jk > 0 else 0.0
                )
                g = 1.0 if e > 1 else -1.0 if e < -1 else e
                total += g * (e - 0.5 * g)
                gradient[i, k] -= 2 * g * w
                if w > 0:
                    gradient[j, i] += g * (2 * w - c / s_ji)
                    gradient[j, k] += g * (2 * w - c / s_jk)
    return total


@compiled("f3 d0 f3 d3 d2 d0 d0 i0 i0 d2")
def _put_together(
    across: _Array,
    twice: float,
    at: _Array,
    exact: _Array,
    squared: _Array,
    mean: float,
    factor: float,
    first: int,
    last: int,
    gradient: _Array,
) -> None:
    """Add the gradient to the squared distances from the sums of the passes."""
    n = len(squared)
    for i in range(first, last):
        for k in range(n):
            pull = 0.0
            for part in range(len(across)):
                pull += across[part, i, k]
            pull = twice * pull + 2.0 * at[0, i, k]
            if exact.shape[1]:
                for part in range(len(exact)):
                    pull += exact[part, i, k]
            pull /= mean
            if at[1, i, k] != 0:
                pull -= at[1, i, k] / squared[i, k]
            gradient[i, k] += factor * pull
