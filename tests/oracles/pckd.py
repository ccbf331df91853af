"""PCKD as the authors' code computes it (losses.py, loops.py), one row and one pair at a time."""

import math
from collections.abc import Sequence

import numpy as np

from tests.oracles.vectors import cosine, divergence, dot, linear, softmax, squares, standardised, unit

Array = np.ndarray


def preview(
    logits: Array, labels: Sequence[int], sample: Sequence[int], epoch: int, growth: float = 1.005
) -> list[float]:
    """w of every row; ``sample[i]`` is the unrotated row of the sample of row i. Their epochs begin at 1."""
    first = sorted(set(sample))
    ce = {i: -math.log(softmax(logits[i])[labels[i]]) for i in first}
    mean = sum(ce.values()) / len(ce)
    threshold = growth ** (epoch + 1)
    w = {i: 1.0 if c / mean <= threshold else math.exp(-((c / mean) ** 2)) for i, c in ce.items()}
    return [w[i] for i in sample]


def contrast(s: Array, t: Array, labels: Sequence[int], temperature: float = 4.0, eps: float = 0.0) -> list[float]:
    """Sum of a row's two supervised contrastive terms; ``eps`` is what their logarithm adds."""
    u, y = np.concatenate([s, t]), [*labels, *labels]
    terms = []
    for a in range(len(u)):
        scores = [float(u[a] @ u[b]) / temperature for b in range(len(u))]
        top = max(scores)
        total = sum(math.exp(scores[b] - top) for b in range(len(u)) if b != a)
        same = [b for b in range(len(u)) if b != a and y[b] == y[a]]
        mean = sum(scores[b] - top - math.log(total + eps) for b in same) / len(same)
        terms.append(-temperature / 0.07 * mean)
    return [terms[i] + terms[i + len(s)] for i in range(len(s))]


def mlp(x: Array, layers: dict[str, Array]) -> Array:
    """Linear, batch norm of this batch (eps 1e-5), ReLU, linear."""
    hidden = np.array([linear(layers["0.weight"], layers["0.bias"], row) for row in x])
    for j in range(hidden.shape[1]):
        hidden[:, j] = np.array(standardised(hidden[:, j], 1e-5)) * layers["1.weight"][j] + layers["1.bias"][j]
    return np.array([linear(layers["3.weight"], layers["3.bias"], row) for row in hidden.clip(min=0)])


def pckd(
    student: tuple[Array, Array, Array, Array],
    teacher: tuple[Array, Array, Array, Array],
    labels: Sequence[int],
    sample: Sequence[int],
    epoch: int,
    parameters: dict[str, Array],
    weights: Sequence[float] = (0.05, 1.0, 20.0, 0.0),
    eps: float = 0.0,
    fixed: Sequence[float] | None = None,
) -> float:
    """L without its task loss. Inputs are (embedding, logits, weight, bias); ``weights`` are beta, alpha, f, delta;
    ``fixed`` are preview weights of other logits.
    """
    (s, zs, ws, bs), (t, zt, wt, bt) = student, teacher
    beta, alpha, f, delta = weights
    w = preview(zs, labels, sample, epoch) if fixed is None else fixed

    def scores(which: str, centres: Array) -> Array:
        own = parameters[f"{which}.linear.weight"], parameters[f"{which}.linear.bias"]
        return np.array([[dot(c, unit(linear(*own, row))) for c in centres] for row in s])

    con = contrast(scores("to_student", ws), scores("to_teacher", wt), labels, eps=eps)
    total = beta * sum(a * b for a, b in zip(w, con, strict=True)) / len(s)
    if ws.shape == wt.shape:
        a, b = (np.concatenate([x, y[:, None]], 1) for x, y in ((ws, bs), (wt, bt)))
        total += alpha * squares(a.flat, b.flat) / a.size
    projected = mlp(s, {k.removeprefix("align."): v for k, v in parameters.items() if k.startswith("align.")})
    total += f * (2 - 2 * sum(cosine(a, b) for a, b in zip(projected, t, strict=True)) / len(s))
    kl, first = 0.0, sorted(set(sample))
    for i in first:
        kl += w[i] * 16 * divergence(softmax(zt[i], 4.0), softmax(zs[i], 4.0)) / len(first)
    return total + delta * kl
