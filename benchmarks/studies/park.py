"""The setting of Park et al. 2019: students of a teacher trained on the same classes of CIFAR-100, and generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.models import CIFARResNet, Embedded

from .images import WIDTHS, embed_all, fit, load_images
from .methods import SCORES, measure
from .runner import Row, Run, cached

TEACHER_EPOCHS, EPOCHS = 36, 24
GENERATIONS = {"RKD of generation 1": "none", "RKD of generation 2": "RKD of generation 1"}
"""The loss of the network that teaches each; the first is taught by the student alone of the same seed."""


class ParkStudy:
    """Students of a resnet20 that has learned from the same images as they do.

    Args:
        data: Folder with ``cifar100-train-classes-00-49.zip`` and ``cifar100-test.zip``.
        cache: Folder for images and for features of the networks that teach.
    """

    name = "park"
    title = "Unseen classes of CIFAR-100: students of a teacher trained alike"
    settings = (("cifar100", "64"),)
    scores = SCORES
    seeds = 5
    together = True
    names: ClassVar = {"cifar100": "teacher resnet20", "64": "student resnet8, 64 outputs each"}

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache

    def plan(self, rows: Sequence[Row]) -> Iterator[Run]:
        """The teacher, then all students seed by seed."""
        run = partial(Run, self.name, "cifar100", stage="final")
        yield run("teacher", loss="none", beside="triplet", weight=0.0, seed=0)
        for seed in range(self.seeds):
            student = partial(run, "64", seed=seed)
            yield student(loss="none", beside="triplet", weight=0.0)
            for loss in ("RKD", "RKDDistance", "RKDAngle", *GENERATIONS):
                yield student(loss=loss, beside="none", weight=0.0)
            yield student(loss="RKD", beside="triplet", weight=1.0)

    def train(self, run: Run) -> Mapping[str, float]:
        """Scores of a run after its last epoch."""
        labels = load_images(self.data, self.cache, "test")[2]
        found, teacher = self.embed_by(run)["test"], self.embed_by(self.teacher_of(run))["test"]
        return measure(found, F.normalize(teacher), labels, found)

    def teacher_of(self, run: Run) -> Run:
        """Run whose network teaches another run's."""
        if run.loss in GENERATIONS:
            loss = GENERATIONS[run.loss]
            return replace(run, loss=loss, beside="triplet" if loss == "none" else "none")
        return replace(run, student="teacher", loss="none", beside="triplet", weight=0.0, seed=0)

    def embed_by(self, run: Run) -> dict[str, Tensor]:
        """Embeddings of all images by a run's network, trained if there are none yet."""
        name = "-".join((run.student, run.loss, run.beside, str(run.seed))).replace(" ", "-")
        return cached(self.cache / "park" / f"{name}.safetensors", lambda: self.train_network(run))

    def train_network(self, run: Run) -> dict[str, Tensor]:
        """Embeddings of all images by a network that this trains."""
        images, _, labels = load_images(self.data, self.cache, "train")
        teaches, generation = run.student == "teacher", int(run.loss[-1]) if run.loss in GENERATIONS else 0
        teacher = torch.zeros(len(images), 1) if run.loss == "none" else self.embed_by(self.teacher_of(run))["train"]
        torch.manual_seed(run.seed + 1000 * generation)  # a generation does not begin as its teacher did
        network = Embedded(CIFARResNet(20 if teaches else 8, WIDTHS), 64)
        losses = replace(run, loss="RKD") if generation else run
        epochs = TEACHER_EPOCHS if teaches else EPOCHS
        fit(losses, network, images, F.normalize(teacher), labels, epochs, labelled=True)
        tests = load_images(self.data, self.cache, "test")[0]
        return {"train": embed_all(network, images), "test": embed_all(network, tests)}
