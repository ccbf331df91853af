"""Embedding matching in loops."""

import math

import numpy as np

from tests.oracles.vectors import cosine


def embed_distill(student: np.ndarray, teacher: np.ndarray, distance: str = "l2") -> float:
    """Of embeddings that are equally wide."""
    gap = math.dist if distance == "l2" else lambda s, t: 1 - cosine(s, t)
    return sum(gap(s, t) for s, t in zip(student, teacher, strict=True)) / len(student)


def projected(student: np.ndarray, teacher: np.ndarray, p: dict[str, np.ndarray], distance: str = "l2") -> float:
    return embed_distill(student @ p["project.weight"].T + p["project.bias"], teacher, distance)
