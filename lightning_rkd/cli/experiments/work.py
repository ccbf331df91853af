"""What a worker does for a comparison: trains and measures one network, or writes the cache of the teacher."""

from __future__ import annotations

import datetime
import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_rkd.cli.experiments import runs as study
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.settings import with_settings
from lightning_rkd.data.indexing import count_root_rows
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.distillation.teachers.cache_writer import write_cache
from lightning_rkd.utils.provenance import hardware

Report = Callable[[Mapping[str, Any]], None]

_LOADED = study.Loaded()


def work(task: dict[str, Any], report: Report) -> None:
    """Do one task; what it leaves lies in its folder.

    Args:
        task: See :meth:`lightning_rkd.cli.experiments.tasks.Task.message`.
        report: Hears of the beginning (``begin``) and the steps (``step``) of training.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        _fill(task, report) if task["fills"] else _train(task, report)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(task: dict[str, Any], report: Report) -> None:
    teacher = None if task["teacher"] is None else Run("teacher", 0, 0, 0.0, weights=task["teacher"])
    measures = {"test": study.on_test_data, "validation": study.on_validation_data}
    study.run(
        task["network"],
        task["config"],
        Path(task["folder"]),
        task["seed"],
        teacher,
        [_Steps(report)],
        _LOADED,
        measure=measures[task["split"]],
        paths=task["paths"],
        about={
            "date": f"{datetime.date.today()}",
            "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"),
            "commit": task["commit"],
        },
    )


def _fill(task: dict[str, Any], report: Report) -> None:
    folder = Path(task["folder"])
    cli = study.prepare(with_settings(task["config"], task["paths"]), folder, task["seed"], images=_LOADED)
    distiller = cli.model.distiller
    teacher = distiller.teacher
    assert isinstance(teacher, Teacher)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    loader = cli.datamodule.train_dataloader()
    report({"event": "begin", "first": 0, "steps": count_root_rows(loader.dataset), "unit": "images"})
    write_cache(
        folder,
        teacher,
        distiller.teacher_layer,
        loader,
        unpack=cli.model.unpack,
        device=cli.trainer.strategy.root_device,
        progress=lambda done, rows: report({"event": "step", "done": done}),
    )


class _Steps(pl.Callback):
    """Reports how far training is, a few times a second at most."""

    def __init__(self, report: Report) -> None:
        self.report, self.last = report, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the beginning."""
        steps = int(trainer.estimated_stepping_batches)
        self.report({"event": "begin", "first": trainer.global_step, "steps": steps})

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Report the step."""
        if time.monotonic() - self.last > 0.3:
            self.last = time.monotonic()
            self.report({"event": "step", "done": trainer.global_step})
