"""MHGD as the authors' code computes it, in numpy's SVD and plain loops."""

import math

import numpy as np

from tests.oracles.vectors import divergence as kl
from tests.oracles.vectors import softmax


def first_vectors(feature_map: np.ndarray, k: int) -> list[np.ndarray]:
    """Right singular vectors of one sample's map (C, H, W), as positions x channels; the sign along the mean row."""
    rows = np.array([feature_map[:, i, j] for i in range(feature_map.shape[1]) for j in range(feature_map.shape[2])])
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    found = []
    for i in range(min(k, *rows.shape)):
        v = vt[i] if s[i] > 1e-7 * s[0] else np.zeros_like(vt[i])
        found.append(-v if rows.sum(0) @ v < 0 else v)
    return found


def aligned(candidates: list[np.ndarray], target: np.ndarray) -> np.ndarray:
    best, cosine = candidates[0], 0.0
    for v in candidates:
        c = float(v @ target)
        if abs(c) > abs(cosine):
            best, cosine = v, c
    return best * np.sign(cosine)


def head(sender: dict, receiver: dict, back: np.ndarray, front: np.ndarray, heads: int) -> np.ndarray:
    """Logits (heads, N, N); ``sender`` and ``receiver`` hold weight, mean, var, gamma, beta."""

    def project(p: dict, x: np.ndarray) -> np.ndarray:
        y = x @ p["weight"].T
        return (y - p["mean"]) / np.sqrt(p["var"] + 1e-5) * p["gamma"] + p["beta"]

    s, r, n = project(sender, back), project(receiver, front), len(back)
    width = s.shape[1] // heads
    logits = np.zeros((heads, n, n))
    for h in range(heads):
        for i in range(n):
            for j in range(n):
                logits[h, i, j] = sum(s[i, d * heads + h] * r[j, d * heads + h] for d in range(width))
    return logits


def divergence(student: np.ndarray, teacher: np.ndarray) -> float:
    """Sum over heads, rows and columns of KL(student || teacher), hyperbolic tangent first."""
    total = 0.0
    for h in range(len(student)):
        for i in range(student.shape[1]):
            total += kl(softmax(np.tanh(student[h, i])), softmax(np.tanh(teacher[h, i])))
    return total


def mhgd(student: list[np.ndarray], teacher: list[np.ndarray], pairs: list[tuple[dict, dict]], heads: int) -> float:
    """The transfer loss of maps (N, C, H, W), summed over everything; ``pairs`` holds sender and receiver per pair."""
    n = len(student[0])
    t = [np.array([first_vectors(m[i], 1)[0] for i in range(n)]) for m in teacher]
    s = [np.array([aligned(first_vectors(m[i], 4), v[i]) for i in range(n)]) for m, v in zip(student, t, strict=True)]
    total = 0.0
    for stage, (sender, receiver) in enumerate(pairs, start=1):
        graphs = [head(sender, receiver, v[stage], v[stage - 1], heads) for v in (s, t)]
        total += divergence(*graphs)
    return total


def estimate(front: np.ndarray, logits: np.ndarray, kept: np.ndarray, features: dict, out: dict) -> np.ndarray:
    """The estimator in training: batch statistics, softmax, dropped heads, weights and bias, unit length."""
    y = front @ features["weight"].T
    x = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * features["gamma"] + features["beta"]
    x = np.maximum(x, 0)
    heads, n, _ = logits.shape
    rows = []
    for i in range(n):
        joined: list[float] = []
        for h in range(heads):
            joined += list(kept[h, i] * sum(softmax(logits[h, i])[j] * x[j] for j in range(n)))
        row = out["weight"] @ np.array(joined) + out["bias"]
        rows.append(row / np.sqrt((row**2).sum()))
    return np.array(rows)


def clipped(task: np.ndarray, pull: np.ndarray, epoch: int, clip: float = 1.0) -> np.ndarray:
    """g_task + clip_by_norm(g_dist, |g_task| sigmoid(epoch)), the bound times ``clip``."""
    bound = clip * math.sqrt(float((task**2).sum())) / (1 + math.exp(-epoch))
    length = math.sqrt(float((pull**2).sum()))
    return task + (pull * bound / length if length > bound else pull)
