"""Soft targets and cross-entropies in plain Python loops, and what the schemes for classifiers make of them.

Written from the equations in the published code named by each scheme; logits are lists of rows of floats.
"""

import math
from typing import Any

from tests.oracles.soft_target import soft_target
from tests.oracles.vectors import dot, softmax, squares

Rows = list[list[float]]


def cross_entropy(logits: Rows, labels: list[int]) -> float:
    return -sum(math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / len(logits)


def divergence(student: Rows, teacher: Rows, temperature: float) -> float:
    """KL of the teacher's softened probabilities from the student's, mean over rows, without T squared."""
    return soft_target(student, teacher, temperature) / temperature**2


def soft_and_hard(student: Rows, teacher: Rows, labels: list[int], temperature: float, alpha: float) -> float:
    soft = alpha * temperature * temperature * divergence(student, teacher, temperature)
    return soft + (1 - alpha) * cross_entropy(student, labels)


def multi_head(
    final: tuple[Rows, Rows], heads: list[tuple[Rows, Rows]], labels: list[int], temperature: float, alpha: float,
    beta: float,
) -> tuple[float, float]:  # fmt: skip
    """The two parts of the loss; every pair is (student, teacher)."""
    last = soft_and_hard(*final, labels, temperature, alpha)
    middle = 0.0
    for zs, zt in heads:
        middle += cross_entropy(zt, labels) + beta * soft_and_hard(zs, zt, labels, temperature, alpha)
    return last, middle


def ensemble(branches: list[Rows]) -> Rows:
    rows, classes = range(len(branches[0])), range(len(branches[0][0]))
    return [[sum(z[i][k] for z in branches) / len(branches) for k in classes] for i in rows]


def online(
    branches: list[Rows], labels: list[int], temperature: float, fixed: Rows | None = None
) -> tuple[float, float]:
    """Cross-entropies and soft targets, each summed over branches; ``fixed`` is the ensemble of other branches."""
    mean = fixed or ensemble(branches)
    hard = sum(cross_entropy(z, labels) for z in branches)
    return hard, sum(temperature**2 * divergence(z, mean, temperature) for z in branches)


def overlap(weights: list[Rows]) -> float:
    """Frobenius norms of the products of every two classifiers' weights, each K rows of D numbers."""
    total = 0.0
    for i in range(len(weights)):
        for j in range(i + 1, len(weights)):
            a, b = weights[i], weights[j]
            square = 0.0
            for p in range(len(a[0])):
                for q in range(len(b[0])):
                    square += sum(a[k][p] * b[k][q] for k in range(len(a))) ** 2
            total += math.sqrt(square)
    return total


NetOutputs = tuple[list[float], Rows]
"""Scores and auxiliary logits of one relation net for all anchors."""


def relations(
    near: list[NetOutputs],
    far: list[NetOutputs],
    labels: list[int],
    others: list[int],
    deepest: tuple[NetOutputs, NetOutputs] | None = None,
) -> tuple[float, float, float]:
    """Classes, triplets and scores of class-oriented self-distillation; the last net belongs to the deepest stage.

    ``deepest`` are the outputs that the others imitate, if not those of the last net.
    """
    count, ((near_p, near_aux), (far_p, far_aux)) = len(labels), deepest or (near[-1], far[-1])
    classes = triplet = scores = 0.0
    for (p, aux_p), (n, aux_n) in zip(near, far, strict=True):
        classes += 0.16 * divergence(aux_p, near_aux, 1.0) + 0.04 * cross_entropy(aux_p, labels)
        classes += 0.04 * divergence(aux_n, far_aux, 1.0)
        for i in range(count):
            smooth = [0.5 * (k == labels[i]) + 0.5 * (k == others[i]) for k in range(len(aux_n[i]))]
            predicted = softmax(aux_n[i], 3.0)
            classes -= 0.01 * sum(t * math.log(q) for t, q in zip(smooth, predicted, strict=True)) / count
            triplet += 0.01 * max(p[i] - n[i] + 1.0, 0.0) / count
            scores += 0.01 * ((p[i] - near_p[i]) ** 2 + (n[i] - far_p[i]) ** 2) / count
    return classes, triplet, scores


def squared(a: Rows, b: Rows) -> float:
    """Mean over samples of squared distances, divided by the number of features."""
    return sum(squares(x, y) / len(x) for x, y in zip(a, b, strict=True)) / len(a)


def judged(
    logits: Rows, labels: list[int], others: list[int], seen: Rows, classes: list[int], judge: dict[str, Any]
) -> float:
    """1.29 times the mean distance to the memory of the own class, less that to another class.

    ``seen`` are the predictions of earlier samples, of the ``classes``; a class's memory is their mean, counted with
    the certainty it begins with. The judge is a linear layer to one number, batch norm over all pairs (their own mean
    and variance where ``mean`` is None), ReLU, another linear layer and the logistic function.
    """
    count = len(logits[0])
    memory = []
    for c in range(count):
        rows = [[float(k == c) for k in range(count)]] + [p for p, own in zip(seen, classes, strict=True) if own == c]
        memory.append([sum(row[k] for row in rows) / len(rows) for k in range(count)])
    values = []
    for choice in (labels, others):
        for z, c in zip(logits, choice, strict=True):
            pair = softmax(z) + memory[c]
            values.append(dot(judge["weights"], pair) + judge["bias"])
    mean, var = judge["mean"], judge["var"]
    if mean is None:
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
    scores = []
    for v in values:
        normed = judge["gamma"] * (v - mean) / math.sqrt(var + judge["eps"]) + judge["beta"]
        scores.append(1 / (1 + math.exp(-(judge["slope"] * max(normed, 0.0) + judge["offset"]))))
    rows = len(logits)
    return 1.29 * (sum(scores[:rows]) - sum(scores[rows:])) / rows
