"""Every loss on ``GlyphDataModule``: same student and steps, three seeds, weights selected on validation classes.

Run ``python benchmarks/losses.py``; it writes ``docs/losses_on_glyphs.md``. Every training is a line of
``docs/losses_on_glyphs.csv`` and is not repeated if it exists: an interrupted run resumes, and a new loss is
added to the others (delete the file to start again). ``--jobs`` processes with one thread each share the work.

Teacher and student are those of the recipes ``glyphs_classifier_teacher`` and ``glyphs_distill``. For each loss
    1. a short run finds the weight that matches its gradient norm and the task's (``balance=1``);
    2. that weight times 0.3, 1, 3 and 10 is tried with the first seed, then smaller or greater ones while the best is
       at that end, at most twice; best is the highest MAP@R on the *validation* classes;
    3. the other seeds are trained with the chosen weight.
Test classes select nothing. Lines of the file with other settings or another teacher are not used.

Runs with one seed have the same batches for every loss, so the teacher outputs of the first run are kept (3 GB each).
Seconds per step are measured without that.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

import lightning_rkd.losses
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import embed, train
from lightning_rkd.cli.experiments.settings import with_settings
from lightning_rkd.distillation.teachers import Teacher, TeacherOutput
from lightning_rkd.losses import LossSum, RelationalLoss
from lightning_rkd.losses.base import NonFiniteError
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.types import Batch, Outputs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses_on_glyphs.md"
RUNS = PAGE.with_suffix(".csv")
FACTORS = (0.3, 1.0, 3.0, 10.0)
FURTHER = ((0.1, 0.03), (30.0, 100.0))  # tried where the best of those is the smallest, or the greatest
SEEDS = (0, 1, 2)
STEPS, CALIBRATION, TIMED = 200, 50, 40
ALONE = "no distillation"

# What a loss is given beyond its defaults: why, and the settings by dotted path in the recipe
BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "MHGD": (
        "with a fixed weight instead of clipped gradients; its graph is trained beforehand, for 200 steps",
        {},
    ),
    "HardDarkRank": ("on unnormalised rows, though meant for unit norm", {}),
    "SoftDarkRank": ("on unnormalised rows, though meant for unit norm", {}),
    "CRCD": (
        "100 negatives instead of 500, with which a step takes seconds",
        {"model.init_args.loss.init_args.negatives": 100},
    ),
    "IRG": (
        "no relations between stages, because their widths differ",
        {"model.init_args.loss.init_args.transform_layers": []},
    ),
    "STKD": (
        "images mixed with `MixUp`, and the transfer term only, since the task has its own loss",
        {
            "model.init_args.loss.init_args.share": 1.0,
            "model.init_args.batch_transform": {"class_path": "MixUp", "init_args": {"num_classes": 315}},
        },
    ),
    "PCKD": (
        "with `Rotations`: every step also has three rotations of its images, 480 rows",
        {"model.init_args.batch_transform": {"class_path": "Rotations"}},
    ),
}
LEFT_OUT = {"Matryoshka": "is another loss, several times"}


def names() -> list[str]:
    """The losses of the gallery that can be trained here."""
    found = {name: getattr(lightning_rkd.losses, name) for name in lightning_rkd.losses.__all__}
    classes = {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, RelationalLoss)}
    return sorted(n for n, c in classes.items() if c not in (RelationalLoss, LossSum) and n not in LEFT_OUT)


def beyond(loss: str) -> dict[str, Any]:
    """The settings of a loss that are not its defaults."""
    return BEYOND[loss][1] if loss in BEYOND else {}


def recipe(name: str) -> dict[str, Any]:
    """A recipe as a configuration."""
    config: dict[str, Any] = yaml.safe_load((recipes.FOLDER / f"{name}.yaml").read_text())
    return config


def student(loss: str, steps: int, teacher: Path, weight: float | None, **more: Any) -> dict[str, Any]:
    """The configuration of one student."""
    config = recipe("glyphs_distill")
    epoch = min(50, steps)
    settings: dict[str, Any] = {
        "model.init_args.lr_scheduler.init_args.total_steps": steps,
        "data.init_args.batches_per_epoch": epoch,
        "trainer.max_epochs": steps // epoch,
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": False,
        **more,
    }
    if loss == ALONE:
        for key in ("teacher", "teacher_layer", "loss"):
            del config["model"]["init_args"][key]
    else:
        settings |= {
            "model.init_args.teacher.init_args.weights": str(teacher),
            "model.init_args.loss": {"class_path": loss, "init_args": {}},
            "model.init_args.weight": 1.0 if weight is None else weight,
            **beyond(loss),
        }
    if loss == "MHGD":
        settings["model.init_args.loss.init_args.estimator"] = str(trained_estimator(teacher))
    return with_settings(config, settings)


class Kept:
    """A teacher whose answers to inputs that it has seen before are taken from a file."""

    def __init__(self, teacher: Teacher, file: Path) -> None:
        self.teacher, self.file, self.new = teacher, file, False
        self.known: dict[str, Any] = torch.load(file, mmap=True) if file.exists() else {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def outputs(self, batch: Batch, calls: Any = None) -> list[TeacherOutput]:
        key = hashlib.sha1(batch.inputs.numpy().tobytes()).hexdigest()
        if key not in self.known:
            found = self.teacher.outputs(batch, calls)[0].features
            self.known[key] = found["embedding"].embedding, found["logits"].logits, found["feature_maps"].feature_maps
            self.new = True
        everything = Outputs(*self.known[key], self._classifier())
        return [TeacherOutput(dict.fromkeys(("embedding", "logits", "feature_maps", "classifier"), everything))]

    def _classifier(self) -> tuple[Any, Any]:
        layer = self.teacher.network.classifier
        return layer.weight.detach(), layer.bias.detach()


class Remember(pl.Callback):
    """Puts :class:`Kept` between a run and its teacher."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        module.distiller.teacher = Kept(module.distiller.teacher, self.file)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        kept = module.distiller.teacher
        if kept.new and not self.file.exists():
            partial = self.file.with_suffix(f".{os.getpid()}")
            torch.save(kept.known, partial)
            partial.replace(self.file)


def remembering(loss: str, seed: int, out: Path) -> list[pl.Callback]:
    """For losses that see the batches as they come."""
    plain = loss != ALONE and "model.init_args.batch_transform" not in beyond(loss)
    return [Remember(out / "teacher" / f"answers-{seed}.pt")] if plain else []


class Clock(pl.Callback):
    """The seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.balance: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.balance += [float(v) for k, v in trainer.callback_metrics.items() if k.startswith("balance/")]


def calibrate(loss: str, teacher: Path, folder: Path) -> float:
    """The weight at which the loss pulls at what it reads as strongly as the task: the median of the last steps."""
    clock = Clock()
    settings = {"model.init_args.balance": 1.0}
    train(student(loss, CALIBRATION, teacher, None, **settings), folder, 0, [clock])
    found = [b for b in clock.balance[-CALIBRATION // 2 :] if b > 0]
    return statistics.median(found) if found else 1.0


def scores(module: pl.LightningModule, loader: Any) -> dict[str, float]:
    """Retrieval with the student's embeddings."""
    metric = EmbeddingRetrieval()
    metric.update(*embed(module.student.backbone, loader))
    return {name: float(value) for name, value in metric.compute().items()}


COLUMNS = ["loss", "settings", "kind", "weight", "seed", "seconds"]
COLUMNS += [f"{part}_{score}" for part in ("val", "test") for score in ("recall_at_1", "map_at_r", "r_precision")]


@functools.cache
def fingerprint(loss: str, teacher: Path) -> str:
    """Of all that decides what a training of that loss gives, weight and seed aside: settings and teacher."""
    config = student(loss, STEPS, Path("teacher"), None) if loss != "MHGD" else [beyond(loss), STEPS]
    state = torch.load(teacher, map_location="cpu", weights_only=True)["state_dict"]
    weights = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    return hashlib.sha1(json.dumps(config, sort_keys=True, default=str).encode() + weights).hexdigest()[:8]


def kept_rows(loss: str, teacher: Path) -> list[dict[str, Any]]:
    """The trainings of a loss that have been done with these settings.

    Of kind ``train``, ``balance`` (the weight that was found) or ``time``.
    """
    with RUNS.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    rows = [row for row in rows if row["loss"] == loss and row["settings"] == fingerprint(loss, teacher)]
    for row in rows:
        row |= {k: float(v) if v else None for k, v in row.items() if k not in ("loss", "settings", "kind")}
    return rows


def keep(row: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """Add a line to the file; lines of several processes do not mix."""
    row["settings"] = fingerprint(row["loss"], teacher)
    line = ",".join("" if row.get(key) is None else str(row[key]) for key in COLUMNS) + "\n"
    with RUNS.open("a", encoding="utf-8") as file:
        file.write(line)
    return row


def run(loss: str, weight: float | None, seed: int, teacher: Path, folder: Path) -> dict[str, Any]:
    """Train one student and evaluate it on validation and test classes."""
    row: dict[str, Any] = {"loss": loss, "kind": "train", "weight": weight, "seed": seed}
    callbacks = remembering(loss, seed, folder.parents[1])
    try:
        module, data, row["seconds"] = train(student(loss, STEPS, teacher, weight), folder, seed, callbacks)
    except NonFiniteError as error:  # a weight too great: the others go on
        print(f"{loss}, weight {weight:g}: {error}", flush=True)
        return row
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        row |= {f"{part}_{name}": value for name, value in scores(module, loader).items()}
    return row


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The training with the highest MAP@R on the validation classes."""
    return max(rows, key=lambda row: row["val_map_at_r"] or 0.0)


def work(job: tuple[str, Path, Path]) -> str:
    """All trainings of one loss that have not been done."""
    loss, teacher, out = job
    torch.set_num_threads(1)
    done = kept_rows(loss, teacher)
    folder = out / "run" / loss.replace(" ", "_")

    def trained(weight: float | None, seed: int) -> dict[str, Any]:
        for row in done:
            if (row["kind"], row["weight"], row["seed"]) == ("train", weight, seed):
                return row
        done.append(keep(run(loss, weight, seed, teacher, folder), teacher))
        return done[-1]

    weight = None
    if loss != ALONE:
        found = [row["weight"] for row in done if row["kind"] == "balance"]
        if not found:
            found = [float(f"{calibrate(loss, teacher, folder):.3g}")]
            keep({"loss": loss, "kind": "balance", "weight": found[0]}, teacher)

        def tried(factor: float) -> dict[str, Any]:
            return trained(float(f"{factor * found[0]:.3g}"), SEEDS[0])

        rows = [tried(factor) for factor in FACTORS]
        for end, further in zip((rows[0], rows[-1]), FURTHER, strict=True):
            for factor in further:
                if best(rows) is not end:
                    break
                rows.append(end := tried(factor))
        weight = best(rows)["weight"]
    rows = [trained(weight, seed) for seed in SEEDS]
    scores = [row["test_recall_at_1"] for row in rows if row.get("test_recall_at_1") is not None]
    return f"{loss}: weight {weight}, recall_at_1 {statistics.fmean(scores):.3f}"


def timed(losses: list[str], teacher: Path, out: Path) -> dict[str, float]:
    """Median seconds per step, one loss after the other; for an otherwise idle machine."""
    known: dict[str, float] = {}
    for loss in losses:
        before = [row["seconds"] for row in kept_rows(loss, teacher) if row["kind"] == "time"]
        if before:
            known[loss] = before[0]
        else:
            clock = Clock()
            train(student(loss, TIMED, teacher, 1e-6), out / "run" / loss.replace(" ", "_"), 0, [clock])
            known[loss] = statistics.median(clock.seconds[10:])
            keep({"loss": loss, "kind": "time", "seconds": known[loss]}, teacher)
    return known


def chosen(loss: str, teacher: Path) -> list[dict[str, Any]]:
    """The trainings of a loss with the weight that was chosen in validation, one a seed."""
    rows = [row for row in kept_rows(loss, teacher) if row["kind"] == "train"]
    tried = [row for row in rows if row["seed"] == SEEDS[0]]
    weight = best(tried)["weight"]
    at_the_end = loss != ALONE and weight in (min(r["weight"] for r in tried), max(r["weight"] for r in tried))
    found = [next(row for row in rows if row["weight"] == weight and row["seed"] == seed) for seed in SEEDS]
    return [row | {"at_the_end": at_the_end} for row in found]


def trained_teacher(out: Path) -> tuple[Path, dict[str, float]]:
    """The teacher's checkpoint and its scores on the test classes."""
    folder, config = out / "teacher", recipe("glyphs_classifier_teacher")
    if not (folder / "scores.json").exists():
        module, data, _ = train(with_settings(config, {"trainer.accelerator": "cpu"}), folder, 0)
        (folder / "scores.json").write_text(json.dumps(scores(module, data.test_dataloader())))
    return folder / "last.ckpt", json.loads((folder / "scores.json").read_text())


def trained_estimator(teacher: Path) -> Path:
    """The checkpoint of MHGD's first stage on that teacher."""
    folder = teacher.parent.with_name("estimator")
    if not (folder / "last.ckpt").exists():
        settings = {"model.init_args.teacher.init_args.weights": str(teacher), "trainer.accelerator": "cpu"}
        train(with_settings(recipe("glyphs_mhgd_estimator"), settings), folder, SEEDS[0])
    return folder / "last.ckpt"


def cell(values: list[float]) -> str:
    """Mean and spread (standard deviation)."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def page(rows: dict[str, list[dict[str, Any]]], seconds: dict[str, float], teacher: dict[str, float]) -> str:
    """The table, best first."""
    order = sorted(rows, key=lambda loss: -statistics.fmean(row["test_map_at_r"] for row in rows[loss]))
    factors = ", ".join(f"{factor:g}" for factor in FACTORS)
    lines = [
        "# Every loss on Glyphs",
        "",
        f"Written by `python benchmarks/losses.py` on {datetime.date.today()}; {platform.machine()}, {os.cpu_count()} "
        f"cores, one thread a process, PyTorch {torch.__version__}. The single runs are in "
        "[losses_on_glyphs.csv](losses_on_glyphs.csv).",
        "",
        f"A student (recipe `glyphs_distill`) is trained for {STEPS} steps of 120 glyphs with cross-entropy and one "
        "loss at its default arguments, and evaluated on unseen classes. Mean ± standard deviation of the seeds "
        f"{', '.join(map(str, SEEDS))}. The weight gives the loss, where it reads the student, a gradient norm of "
        f"{factors} times the task's, or up to {FURTHER[1][-1]:g} or down to {FURTHER[0][-1]:g} if the best is at that "
        "end; it is selected with the first seed on validation classes, never on test classes (* still at an end: a "
        "weight beyond might do better). One small task says little about others: the table shows that every loss "
        "trains, and what it costs (the median of 30 steps including the teacher, with whatever other load the machine "
        "had). "
        f"Teacher: recall_at_1 {teacher['recall_at_1']:.3f}, map_at_r {teacher['map_at_r']:.3f}.",
        "",
        "| loss | recall_at_1 | map_at_r | weight | ms per step |",
        "|---|---:|---:|---:|---:|",
    ]
    for loss in order:
        recall, precision = ([row[f"test_{key}"] for row in rows[loss]] for key in ("recall_at_1", "map_at_r"))
        weight = rows[loss][0]["weight"]
        name = loss if loss == ALONE else f"[`{loss}`](losses.md#{loss.lower()})"
        number = "" if weight is None else f"{weight:.3g}{' *' if rows[loss][0]['at_the_end'] else ''}"
        lines.append(f"| {name} | {cell(recall)} | {cell(precision)} | {number} | {1000 * seconds[loss]:.0f} |")
    lines += ["", "Beyond the defaults: " + "; ".join(f"`{loss}`: {why}" for loss, (why, _) in BEYOND.items()) + "."]
    lines += ["", "Left out: " + "; ".join(f"`{loss}`, which {why}" for loss, why in LEFT_OUT.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="some losses only; no page is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not RUNS.exists():
        RUNS.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    torch.set_num_threads(1)
    teacher, of_teacher = trained_teacher(args.out)
    losses = [ALONE, *names()] if args.only is None else args.only
    jobs = zip(losses, itertools.repeat(teacher.resolve()), itertools.repeat(args.out.resolve()), strict=False)
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for number, line in enumerate(pool.imap_unordered(work, jobs), start=1):
            print(f"{number}/{len(losses)} {line}", flush=True)
    if args.only is not None:
        return
    seconds = timed(losses, teacher, args.out)
    PAGE.write_text(page({loss: chosen(loss, teacher) for loss in losses}, seconds, of_teacher), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
