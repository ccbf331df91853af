"""Tasks of a comparison: the trainings in their order, and the caches that they read."""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_rkd.cli.experiments import runs
from lightning_rkd.cli.experiments.plan import TEACHER, TEACHER_PATH, Comparison, Network, as_teacher
from lightning_rkd.cli.experiments.settings import Config, with_settings
from lightning_rkd.cli.experiments.workers import report
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.distillation.teachers.cache_writer import write_cache
from lightning_rkd.utils.provenance import hardware


@dataclass(frozen=True)
class Task:
    """A training, or (``split`` is ``None``) the writing of the cache of a teacher's outputs.

    ``config`` lacks the paths of files that other tasks write: the teacher's, whose folder is ``teacher``, and the
    cache's.
    """

    network: str
    seed: int
    config: Config = field(repr=False)
    folder: str
    teacher: str | None = None
    cache: Task | None = None
    split: runs.Split | None = "test"

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.network if self.split is None or self.network == TEACHER else f"{self.network}, seed {self.seed}"

    def path(self, out: Path, teacher: str | None) -> Path:
        """Output folder; that of a cache depends on the teacher's weights."""
        return out / (f"{self.folder}-{teacher}" if self.split is None else self.folder)

    def perform(self, out: Path, teacher: str | None, commit: str) -> None:
        """Train and measure the network, or write the cache, given ``weights`` of the teacher's run.

        Progress is reported as (done, total, unit).
        """
        paths = {}
        if self.cache is not None:
            paths[f"{TEACHER_PATH}.path"] = str(self.cache.path(out, teacher))
        elif self.teacher is not None:
            paths[f"{TEACHER_PATH}.weights"] = str(out / self.teacher / "last.ckpt")
        folder = self.path(out, teacher)
        try:
            if self.split is None:
                _write_cache(with_settings(self.config, paths), folder, self.seed)
                return
            device = "cuda" if torch.cuda.is_available() else "cpu"
            about = {"date": f"{datetime.date.today()}", "hardware": hardware(device), "commit": commit}
            run = partial(runs.run, split=self.split, paths=paths, about=about)
            run(self.config, folder, self.seed, teacher, [_Progress()])
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def tasks_of(comparison: Comparison, networks: Sequence[Network], seeds: Sequence[int]) -> list[Task]:
    """The teacher's training, then those of the networks, seed by seed; teachers come before their students."""
    folders = {network.name: network.folder for network in comparison.networks}
    tasks: list[Task] = []
    if comparison.teacher is not None:
        tasks.append(Task(TEACHER, comparison.teacher_seed, comparison.teacher.config, TEACHER))
    for seed in seeds:
        for network in networks:
            row = folders.get(network.teacher or "")
            teacher = network.teacher if row is None else f"{row}-{seed}"
            cache = _cache_task(comparison, network, seed) if network.cached else None
            tasks.append(Task(network.name, seed, network.config, f"{network.folder}-{seed}", teacher, cache))
    return tasks


def _cache_task(comparison: Comparison, network: Network, seed: int) -> Task:
    """One cache for all seeds, unless the seed decides on the augmentation of the views that are cached."""
    assert comparison.teacher is not None
    data = network.config["data"]
    seeded = seed if data.get("init_args", {}).get("views") else None
    name = hashlib.sha256(json.dumps([data, seeded], sort_keys=True).encode()).hexdigest()[:16]
    config = with_settings(network.config, {TEACHER_PATH: as_teacher(comparison.teacher.config)})
    return Task("the teacher's cache", seed, config, f"cache/{name}", TEACHER, split=None)


def _write_cache(config: Config, folder: Path, seed: int) -> None:
    cli = runs.prepare(config, folder, seed)
    distiller = cli.model.distiller
    assert isinstance(distiller.teacher, Teacher)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    write_cache(
        folder,
        distiller.teacher,
        distiller.teacher_layer,
        cli.datamodule.train_dataloader(),
        unpack=cli.model.unpack,
        device=cli.trainer.strategy.root_device,
        progress=lambda done, rows: report(done, rows, "images"),
    )


class _Progress(pl.Callback):
    """Reports the progress of training, a few times a second at most."""

    def __init__(self) -> None:
        self.last, self.steps = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = int(trainer.estimated_stepping_batches)
        report(trainer.global_step, self.steps, "steps")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            report(trainer.global_step, self.steps, "steps")
