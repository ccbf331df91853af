"""Zero-shot intents: students of 36,000 and 100,000 parameters, WordLlama's rows, intents that were not trained on."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightning_rkd.data.samplers.pk import PKBatchSampler
from lightning_rkd.export.preprocess import PiecesPreprocess
from lightning_rkd.models import HashedText

from .methods import EmbeddingStudy, Objective, list_losses, measure
from .runner import Run, cached

STUDENTS = {"36k": {"hidden": 64, "embedding_dim": 32}, "100k": {"hidden": 245, "embedding_dim": 256}}
SPLITS = {"banking77": (30, 8), "clinc150": (60, 20)}
"""Numbers of intents that train and that validate, the first of a permutation; all others test."""

COLD_CSD = "CSD(student_temperature=0.1, teacher_temperature=0.1)"
VARIANTS = (COLD_CSD, f"3 * RKD + {COLD_CSD}", "AnchoredRKD(angle_weight=2.0)")
"""Further settings of the losses: temperatures of ``lightning-rkd distill``, its default loss, anchored angles."""

FIRST = ("RKD", "RKDDistance", "RKDAngle", "CSD", COLD_CSD, VARIANTS[1], "AnchoredRKD", "Regression", "RAML", "VkD")
FIRST += ("RelaxedContrastive", "HardDarkRank")
"""Losses of papers' claims and those that align the spaces, which come first with all seeds."""

SLOW = ("RRD", "CRD", "ROP")
"""Losses whose steps take many times as long as the others' on a CPU; they come last."""

STEPS, INTENTS, TEXTS = 1500, 24, 5


@dataclass(frozen=True)
class Texts:
    """Pieces (N, T), the teacher's unit rows (N, 256) and intents (N,) of all texts, and the rows of each part."""

    pieces: Tensor
    teacher: Tensor
    labels: Tensor
    parts: Mapping[str, Tensor]


def read_banking77(folder: Path) -> list[tuple[str, str]]:
    """Texts and intents of both files."""
    with zipfile.ZipFile(folder / "banking77.zip") as archive:
        names = sorted((n for n in archive.namelist() if n.endswith(("train.csv", "test.csv"))), reverse=True)
        tables = [csv.DictReader(io.StringIO(archive.read(name).decode(), newline="")) for name in names]
    return [(row["text"], row["category"]) for table in tables for row in table]


def read_clinc150(folder: Path) -> list[tuple[str, str]]:
    """Texts and intents of all parts but those out of scope."""
    with zipfile.ZipFile(folder / "clinc150.zip") as archive:
        parts = json.loads(archive.read("clinc150/data_full.json"))
    return [(text, intent) for part in ("train", "val", "test") for text, intent in parts[part]]


READERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {"banking77": read_banking77, "clinc150": read_clinc150}


def split_intents(labels: Tensor, training: int, validation: int) -> dict[str, Tensor]:
    """Rows that train, validate and test, by intents in the order of a fixed permutation."""
    order = torch.randperm(int(labels.max()) + 1, generator=torch.Generator().manual_seed(1))
    intents = order.tensor_split([training, training + validation])
    rows = [torch.isin(labels, part).nonzero()[:, 0] for part in intents]
    return dict(zip(("train", "tune", "final"), rows, strict=True))


class TextStudy(EmbeddingStudy):
    """Students of texts.

    Args:
        data: Folder with ``banking77.zip`` and ``clinc150.zip``.
        cache: Folder for the teacher's rows.
    """

    name = "text"
    settings = tuple((data, student) for data in SPLITS for student in STUDENTS)
    seeds = 10
    title = "Zero-shot intents: students of WordLlama"
    names: ClassVar = {"banking77": "Banking77", "clinc150": "CLINC150", "36k": "35,936 parameters, 32 outputs"} | {
        "100k": "99,909 parameters, 256 outputs"
    }

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache

    def parts(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        """All seeds of the first losses, five of the others, then five more of these, then slow losses."""
        fast = [loss for loss in list_losses(VARIANTS) if loss not in SLOW]
        return iter([(FIRST, range(10)), (fast, range(5)), (fast, range(5, 10)), (SLOW, range(10))])

    def train(self, run: Run) -> dict[str, float]:
        """Scores of a run after its last step."""
        texts = load_texts(run.data, self.data, self.cache)
        held_out = texts.parts[run.stage]
        if run.student == "teacher":
            own = texts.teacher[held_out]
            return measure(own, own, texts.labels[held_out], own)
        rows = texts.parts["train"]
        pieces, teacher, labels = texts.pieces[rows], texts.teacher[rows], texts.labels[rows]
        longest = (pieces != 0).sum(1)
        torch.manual_seed(run.seed)
        network = HashedText(2048, 16, **STUDENTS[run.student])
        with torch.no_grad():
            objective = Objective(run, network(pieces[:2]), teacher[:2], len(rows))
        parameters = [*network.parameters(), *objective.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
        for batch in PKBatchSampler(labels, INTENTS, TEXTS, run.seed, STEPS):
            i = torch.tensor(batch)
            optimizer.zero_grad()
            rows_of_batch = network(pieces[i, : longest[i].max()])
            objective.backward(rows_of_batch, teacher[i], labels=labels[i], indices=i)
            optimizer.step()
            schedule.step()
        objective.eval()
        with torch.no_grad():
            found = torch.cat([network(part) for part in texts.pieces[held_out].split(1000)])
        return measure(found, texts.teacher[held_out], texts.labels[held_out], objective.project(found))


@cache
def load_texts(name: str, folder: Path, teachers: Path) -> Texts:
    """A data set with the teacher's rows."""
    texts, intents = zip(*READERS[name](folder), strict=True)
    known = sorted(set(intents))
    labels = torch.tensor([known.index(intent) for intent in intents])

    def embed() -> dict[str, Tensor]:
        from distill import wordllama

        return {"rows": wordllama()(texts)}

    rows = cached(teachers / f"wordllama-{name}.safetensors", embed)["rows"]
    return Texts(PiecesPreprocess(2048)(texts), rows, labels, split_intents(labels, *SPLITS[name]))
