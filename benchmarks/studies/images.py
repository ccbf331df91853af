"""Unseen classes of CIFAR-100: a resnet8 that learns from EfficientNet-Lite0's features, with and without labels."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, resize

from lightning_rkd.data.samplers.pk import PKBatchSampler
from lightning_rkd.models import CIFARResNet, Embedded

from .methods import EmbeddingStudy, Objective, list_losses, measure
from .runner import Run, cached

EPOCHS, CLASSES, IMAGES = {"tune": 12, "final": 24}, 25, 5
WIDTHS = [16, 16, 32, 64]
VALIDATION = 10
"""Of the 50 training classes; left out of the training while weights are tuned."""

MEAN, STD = torch.tensor([0.507, 0.487, 0.441]), torch.tensor([0.267, 0.256, 0.276])
COLD_CSD = "CSD(student_temperature=0.05, teacher_temperature=0.05)"
VARIANTS = (COLD_CSD, f"3 * RKD + {COLD_CSD}", "AnchoredRKD(angle_weight=2.0)")
LEADING = ("RKD", "RKDDistance", "RKDAngle", COLD_CSD, VARIANTS[1], "AnchoredRKD", "RelaxedContrastive", "VkD")
"""Losses that come first, with five seeds; the others have three."""


class ImageStudy(EmbeddingStudy):
    """Students of images.

    Args:
        data: Folder with ``cifar100-train-classes-00-49.zip`` and ``cifar100-test.zip``.
        cache: Folder for images and the teacher's features.
    """

    name = "images"
    title = "Unseen classes of CIFAR-100: students of EfficientNet-Lite0"
    settings = tuple((data, student) for student in ("64", "1280") for data in ("unlabelled", "labelled"))
    seeds = 5
    names: ClassVar = {
        "unlabelled": "no labels, random batches",
        "labelled": "batches of 25 classes x 5",
        "64": "resnet8 with 64 outputs",
        "1280": "resnet8 with 1,280 outputs",
    }

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache

    def parts(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        """Three seeds of the leading losses, two more of them, then three of the others."""
        yield LEADING, range(3)
        yield LEADING, range(3, 5)
        yield [loss for loss in list_losses(VARIANTS) if loss not in LEADING], range(3)

    def train(self, run: Run) -> dict[str, float]:
        """Scores of a run after its last epoch."""
        images, teacher, labels = load_images(self.data, self.cache, "train")
        held_out = load_images(self.data, self.cache, "test")
        if run.student == "teacher":
            return measure(held_out[1], held_out[1], held_out[2], held_out[1])
        if run.stage == "tune":
            validates = torch.isin(labels, torch.randperm(50, generator=torch.Generator().manual_seed(1))[:VALIDATION])
            held_out = images[validates], teacher[validates], labels[validates]
            images, teacher, labels = images[~validates], teacher[~validates], labels[~validates]
        torch.manual_seed(run.seed)
        network = Embedded(CIFARResNet(8, WIDTHS), int(run.student))
        objective = fit(run, network, images, teacher, labels, EPOCHS[run.stage], labelled=run.data == "labelled")
        found = embed_all(network, held_out[0])
        return measure(found, held_out[1], held_out[2], objective.project(found))


def fit(
    run: Run, network: nn.Module, images: Tensor, teacher: Tensor, labels: Tensor, epochs: int, labelled: bool
) -> Objective:
    """Train a network in place with the losses of a run; the losses with what they have learned."""
    network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        objective = Objective(run, embed(network.eval(), images[:2]), teacher[:2], len(labels))
    network.train()
    batch_size, padded = CLASSES * IMAGES, F.pad(images, [4] * 4)
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW([*network.parameters(), *objective.parameters()], lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(run.seed)
    batches = PKBatchSampler(labels, CLASSES, IMAGES, run.seed, steps) if labelled else _draw(len(labels), generator)
    for _, batch in zip(range(steps), batches, strict=False):
        i = torch.as_tensor(batch)
        optimizer.zero_grad()
        rows = embed(network, augment(padded[i], generator))
        objective.backward(rows, teacher[i], indices=i, **({"labels": labels[i]} if labelled else {}))
        optimizer.step()
        schedule.step()
    network.eval()
    return objective.eval()


def _draw(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(CLASSES * IMAGES)[: count // (CLASSES * IMAGES)]


def augment(padded: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of 32 x 32, half of them mirrored; (N, 3, 40, 40) -> (N, 3, 32, 32)."""
    n = len(padded)
    top, left = torch.randint(9, (2, n, 1), generator=generator) + torch.arange(32)
    left = torch.where(torch.rand(n, 1, generator=generator) < 0.5, left.flip(1), left)
    n_, c = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[n_, c, top[:, None, :, None], left[:, None, None, :]]


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Embeddings of images of bytes, in bf16 with channels last."""
    x = (images / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        return network(x.contiguous(memory_format=torch.channels_last)).float()


def embed_all(network: nn.Module, images: Tensor) -> Tensor:
    """Embeddings of many images, without gradient."""
    with torch.no_grad():
        return torch.cat([embed(network, part) for part in images.split(500)])


@cache
def load_images(data: Path, folder: Path, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (N, 3, 32, 32), the teacher's unit rows (N, 1280) and classes of training classes or of unseen ones."""
    found = cached(folder / f"cifar100-{part}.safetensors", lambda: _read(data, part))
    rows = cached(folder / f"efficientnet-lite0-{part}.safetensors", lambda: _embed_by_teacher(found["images"]))
    return found["images"], F.normalize(rows["rows"]), found["labels"]


def _read(data: Path, part: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(
        data / {"train": "cifar100-train-classes-00-49.zip", "test": "cifar100-test.zip"}[part]
    ) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        classes = sorted({Path(name).parts[2] for name in names})[-50:]
        names = [name for name in names if Path(name).parts[2] in classes]
        images = [pil_to_tensor(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names]
    labels = torch.tensor([classes.index(Path(name).parts[2]) for name in names])
    return {"images": torch.stack(images), "labels": labels}


def _embed_by_teacher(images: Tensor) -> dict[str, Tensor]:
    from distill import Lite0

    teacher, found = Lite0().eval().to(memory_format=torch.channels_last), []
    for part in images.split(100):
        x = resize(part.float(), [128, 128], interpolation=3, antialias=True) / 127.5 - 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(teacher(x.contiguous(memory_format=torch.channels_last)).float())
    return {"rows": torch.cat(found)}
