"""The student of a distillation: made from a specification or an object, and exported when it is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_rkd.cli.distill.losses import find_projection, with_projection
from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.cli.distill.students import Student, build_student
from lightning_rkd.cli.experiments.runs import digest
from lightning_rkd.data.datamodules.folder import suggest_size
from lightning_rkd.export import Embedder, export, load
from lightning_rkd.export.card import Facts
from lightning_rkd.export.formats import FORMATS
from lightning_rkd.losses.weighting import Weighable

STUDENT, PROJECTED = "student", "projected"
"""Folders of the exported student, and of the student with the projection to the teacher's space behind it."""


def identify_student(given: Any) -> str:
    """The student as a specification, or class and checksum of an object."""
    if isinstance(given, str):
        return given
    network = given.network if isinstance(given, Student) else given
    if not isinstance(network, nn.Module):
        raise TypeError(f"student: expected a specification, a network or a Student, got {given!r:.80}")
    return f"{type(network).__name__} {digest(*network.state_dict().values())}"


def make_student(
    given: Any,
    samples: Samples,
    embedding_dim: int,
    image_size: int | None,
    parameters: int | None,
    train: Sequence[int],
) -> Student:
    """Build the student from a specification or a network."""
    if isinstance(given, Student):
        return given
    own = isinstance(given, str) and ":" not in given  # a network of this library, for images of any size
    if samples.kind == "image" and image_size is None and own:
        image_size = _suggest_size(samples)
    return build_student(
        given,
        samples.kind,
        embedding_dim=embedding_dim,
        image_size=image_size,
        vector_dim=samples.items.shape[1] if samples.kind == "vector" else None,
        parameters=parameters,
        texts=samples.fetch(train) if samples.kind == "text" else None,
    )


def _suggest_size(samples: Samples) -> int:
    if isinstance(samples.items[0], Path):
        return suggest_size(samples.items)
    sizes = torch.tensor([sum(x.size) / 2 for x in samples.items[:: max(1, len(samples) // 500)]])
    return max(8, min(64, round(float(sizes.median()))))


def finish_student(student: Student, loss: Weighable, apart: bool) -> tuple[Embedder, nn.Module | None]:
    """The trained student with its preprocessing, and the module from its embeddings to the teacher's space.

    A projection that the loss has trained is part of the student, unless ``apart``. The module is ``None`` if the loss
    has not aligned the two spaces.
    """
    align = find_projection(loss)
    network = student.network if apart else with_projection(student.network, loss)
    return Embedder(network.eval(), student.preprocess), align if align is None or apart else nn.Identity()


def export_student(
    student: Student, loss: Weighable, apart: bool, folder: Path, samples: Samples, formats: Sequence[str], facts: Facts
) -> nn.Module:
    """Export the trained student in the formats that are not there yet, and load it.

    A projection that the loss has trained is part of it, unless ``apart``; then a second export has it.
    """
    projected = with_projection(student.network, loss)
    network = student.network if apart else projected
    exported = _export(student, network, folder / STUDENT, samples, formats, facts)
    if apart and projected is not network:
        _export(student, projected, folder / PROJECTED, samples, formats, facts)
    return exported


def _export(
    student: Student, network: nn.Module, folder: Path, samples: Samples, formats: Sequence[str], facts: Facts
) -> nn.Module:
    build = student.build if network is student.network else None
    there = [name for name, file in FORMATS.items() if (folder / file).is_file()]
    wanted = [*dict.fromkeys([*there, *formats, *(["torch"] if build is None else [])])]  # the program needs no build
    if len(wanted) > len(there):
        inputs, preprocess = student.preprocess(samples.fetch([0])), student.preprocess
        export(network, inputs, folder, formats=wanted, build=build, preprocess=preprocess, facts=facts, overwrite=True)
    return load(folder)
