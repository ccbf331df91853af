"""Every loss on the letters of ``GlyphDataModule``: same student and steps, three seeds, weights chosen in validation.

Run ``python benchmarks/losses.py``; it writes ``docs/losses_on_glyphs.md`` and the single runs beside it as CSV. A run
that was stopped goes on where it was: finished trainings are kept in ``--out``. Two processes (``--jobs``) with one
thread each share the work.

Teacher and student are those of the recipes ``glyphs_classifier_teacher`` and ``glyphs_distill``. For each loss
    1. the weight that makes its gradient as long as the task's is found in a short run (``balance=1``);
    2. that weight times 0.3, 1 and 3 is tried with the first seed, and chosen by MAP@R of the *validation* letters;
    3. the other seeds are trained with the chosen weight, and all seeds are tested on the *test* letters, once.
"""

from __future__ import annotations

import argparse
import csv
import datetime
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

from lightning_rkd import recipes
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.study import embed, train, with_settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses_on_glyphs.md"
FACTORS = (0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
STEPS, CALIBRATION, TIMED = 500, 60, 40
ALONE = "no distillation"

# What a loss is given beyond its defaults, by dotted path in the recipe
SETTINGS: dict[str, dict[str, Any]] = {
    "IRG": {"model.init_args.loss.init_args.transform_layers": []},  # stages of different widths
    "STKD": {
        "model.init_args.loss.init_args.share": 1.0,
        "model.init_args.batch_transform": {
            "class_path": "MixUp",
            "init_args": {"num_classes": 315},
        },
    },
    "PCKD": {"model.init_args.batch_transform": {"class_path": "Rotations"}},
}
LEFT_OUT = {"AICSD": "reads dense logits (segmentation)"}


def names() -> list[str]:
    """The losses of the gallery that can be trained here."""
    import lightning_rkd.losses as every
    from lightning_rkd.losses import LossSum, RelationalLoss, Term

    found = [n for n in every.__all__ if isinstance(c := getattr(every, n), type) and issubclass(c, RelationalLoss)]
    classes = {n: getattr(every, n) for n in found}
    return sorted(n for n, c in classes.items() if c not in (RelationalLoss, Term, LossSum) and n not in LEFT_OUT)


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
            **SETTINGS.get(loss, {}),
        }
    return with_settings(config, settings)


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
    train(student(loss, CALIBRATION, teacher, None, **{"model.init_args.balance": 1.0}), folder, 0, [clock])
    found = [b for b in clock.balance[-CALIBRATION // 2 :] if b > 0]
    return statistics.median(found) if found else 1.0


def scores(module: pl.LightningModule, loader: Any) -> dict[str, float]:
    """Retrieval with the student's embeddings."""
    metric = EmbeddingRetrieval()
    metric.update(*embed(module.student.backbone, loader))
    return {name: float(value) for name, value in metric.compute().items()}


def run(loss: str, weight: float | None, seed: int, teacher: Path, folder: Path) -> dict[str, Any]:
    """Train one student and measure it on validation and test letters."""
    module, data, seconds = train(student(loss, STEPS, teacher, weight), folder, seed)
    row: dict[str, Any] = {"loss": loss, "weight": weight, "seed": seed, "seconds": seconds}
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        row |= {f"{part}_{name}": value for name, value in scores(module, loader).items()}
    return row


def work(job: tuple[str, Path, Path]) -> str:
    """All trainings of one loss that are not there yet, one JSON line each."""
    loss, teacher, out = job
    torch.set_num_threads(1)
    file = out / f"{loss.replace(' ', '_')}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kept(weight: float | None, seed: int) -> dict[str, Any]:
        for row in done:
            if row["weight"] == weight and row["seed"] == seed:
                return row
        row = run(loss, weight, seed, teacher, out / "run" / loss.replace(" ", "_"))
        done.append(row)
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return row

    weight = None
    if loss != ALONE:
        note = out / f"{loss}.balance"
        if not note.exists():
            note.write_text(repr(calibrate(loss, teacher, out / "run" / loss)))
        tried = [kept(float(f"{factor * float(note.read_text()):.3g}"), SEEDS[0]) for factor in FACTORS]
        weight = max(tried, key=lambda row: row["val_map_at_r"])["weight"]
    rows = [kept(weight, seed) for seed in SEEDS]
    (out / f"{loss.replace(' ', '_')}.json").write_text(json.dumps(rows))
    return f"{loss}: weight {weight}, recall_at_1 {statistics.fmean(row['test_recall_at_1'] for row in rows):.3f}"


def timed(losses: list[str], teacher: Path, out: Path) -> dict[str, float]:
    """Median seconds per step, one loss after the other on an otherwise idle machine."""
    file = out / "seconds.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for loss in losses:
        if loss not in known:
            clock = Clock()
            train(student(loss, TIMED, teacher, 1e-6), out / "run" / loss.replace(" ", "_"), 0, [clock])
            known[loss] = statistics.median(clock.seconds[10:])
            file.write_text(json.dumps(known))
    return known


def trained_teacher(out: Path) -> tuple[Path, dict[str, float]]:
    """The teacher's checkpoint and its scores on the test letters."""
    folder, config = out / "teacher", recipe("glyphs_classifier_teacher")
    if not (folder / "scores.json").exists():
        module, data, _ = train(with_settings(config, {"trainer.accelerator": "cpu"}), folder, 0)
        (folder / "scores.json").write_text(json.dumps(scores(module, data.test_dataloader())))
    return folder / "last.ckpt", json.loads((folder / "scores.json").read_text())


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
        f"A student of letters (recipe `glyphs_distill`) is trained for {STEPS} steps of 120 letters with "
        "cross-entropy and one loss at its default arguments, and embeds letters that nobody trained on. Mean ± "
        f"standard deviation of the seeds {', '.join(map(str, SEEDS))}. The weight makes the loss's gradient, where it "
        f"reads the student, {factors} times as long as the task's; which of them was chosen with the first seed on "
        "validation letters, never on test letters. One small task says little about others: the table shows that "
        "every loss trains, and what it costs. "
        f"The teacher itself: recall_at_1 {teacher['recall_at_1']:.3f}, map_at_r {teacher['map_at_r']:.3f}.",
        "",
        "| loss | recall_at_1 | map_at_r | weight | ms per step |",
        "|---|---:|---:|---:|---:|",
    ]
    for loss in order:
        recall, precision = ([row[f"test_{key}"] for row in rows[loss]] for key in ("recall_at_1", "map_at_r"))
        weight = rows[loss][0]["weight"]
        name = loss if loss == ALONE else f"[`{loss}`](losses.md#{loss.lower()})"
        number = "" if weight is None else f"{weight:.3g}"
        lines.append(f"| {name} | {cell(recall)} | {cell(precision)} | {number} | {1000 * seconds[loss]:.0f} |")
    lines += ["", "Left out: " + "; ".join(f"`{loss}`, which {why}" for loss, why in LEFT_OUT.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="some losses only; no page is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
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
    rows = {loss: json.loads((args.out / f"{loss.replace(' ', '_')}.json").read_text()) for loss in losses}
    PAGE.write_text(page(rows, seconds, of_teacher), encoding="utf-8")
    with PAGE.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[ALONE][0]))
        writer.writeheader()
        writer.writerows(row for loss in losses for row in rows[loss])
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
