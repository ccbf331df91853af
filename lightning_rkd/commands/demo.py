"""``lightning-rkd demo``: a teacher, a student alone, and the same student distilled, on unseen classes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_rkd import plots, recipes, study
from lightning_rkd.data.base import ImageDataModule, LabelledImages
from lightning_rkd.data.folder import ImageFolderDataModule, find_images, suggest_size
from lightning_rkd.study import Config, Run, Summary, with_settings
from lightning_rkd.training import check_writable

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student + RKD-DA"

COLUMNS = ("recall_at_1", "map_at_r", "distance_correlation", "seconds")
"""Columns of the table, after name and number of parameters."""

AGREEMENT = "distance_correlation: agreement with the teacher, the rank correlation of distances."

MADE_BY = "demo.yaml"
"""The file that says what a demo did; only a folder that holds it is replaced."""

LARGEST_SIDE, MOST_IMAGES = 32, 25_000
"""What is read of a folder of images, so that the demo takes minutes."""

_STUDENT, _TEACHER = "model.init_args.student.init_args", "model.init_args.teacher.init_args"


@dataclass(frozen=True)
class Plan:
    """What a demo trains: a configuration of each of the three networks, and the words for it."""

    teacher: Config
    alone: Config
    distilled: Config
    things: str
    duration: str
    images: LabelledImages | None = None


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: Data that cannot be used.
        OSError: An output folder that cannot be written or that no demo made.
    """
    options = _parser().parse_args(args)
    demo(options.out, options.seeds, options.steps, options.data)


def demo(out: Path, seeds: Sequence[int] = (0, 1, 2), steps: int | None = None, data: Path | None = None) -> None:
    """Train, compare, print the table, and leave table, pictures, checkpoints and configurations in a folder.

    All work happens in a temporary folder beside ``out``, which takes its place at the end.

    Args:
        out: Output folder; replaced if a demo made it.
        seeds: Of the students. The teacher has the first of them.
        steps: Of each network; ``None`` takes what suits the data.
        data: Folder of images, a class being the folder that directly holds them; ``None`` takes letters.

    Raises:
        ValueError: The data cannot be used.
        OSError: ``out`` cannot be written, or is something that no demo made.
    """
    console, start = Console(highlight=False, width=None if sys.stdout.isatty() else 100), time.perf_counter()
    with _working_folder(out, console) as work:
        plan = _letters_plan() if data is None else _folder_plan(data, console)
        plan = plan if steps is None else _with_steps(plan, steps)
        console.print(
            f"Data: {plan.things}. All networks are tested on classes that none of them has seen in training.\n"
            f"Now training one teacher, and for each of {len(seeds)} seeds a student alone and the same student with "
            f"RKD-DA. {plan.duration}"
        )
        runs, module = _train_all(plan, seeds, work, console)
        summaries = study.summarise(runs)
        _write_tables(work, runs, summaries)
        _write_pictures(work, runs, module, "letters" if data is None else "classes")
        _write_settings(work, out, seeds, steps, data)
    console.print(_table(summaries))
    console.print(f"{AGREEMENT}\n{_verdict(runs)}")
    console.print(f"It took {_clock(time.perf_counter() - start)}. In {out} there are now")
    for names, what in (
        ("table.md, table.csv, runs.csv", "the table, and every single run"),
        ("neighbours.png", "queries, and the nearest images that the networks find"),
        ("relations.png", "how far apart the networks see the same images"),
        ("*/last.ckpt, */config.yaml", "the networks, and what lightning-rkd fit --config trains them with"),
    ):
        console.print(f"  {names:<30} {what}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-rkd demo",
        description="Train a teacher, a student alone and the same student with relational distillation (RKD-DA), and "
        "compare them on classes that none of them has seen.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="images, each in a folder that is its class; default: letters of many scripts, no download",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(0, 1, 2), metavar="N|LIST", help="how many seeds (3), or which (0,1,2)"
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps of each network")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where results go (runs/demo)"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    """``"3"`` is 0, 1, 2; ``"0,3"`` and ``"3,"`` are lists."""
    parts = [part for part in text.split(",") if part.strip()]
    numbers = tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()
    seeds = tuple(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected a number of seeds (3) or different seeds (0,1,2), got {text!r}")
    return seeds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _letters_plan() -> Plan:
    teacher, alone, distilled = (
        yaml.safe_load((recipes.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("glyphs_teacher", "glyphs_student", "glyphs_rkd")
    )
    return Plan(
        teacher,
        alone,
        distilled,
        "letters of many scripts",
        "With three seeds it takes about 4 minutes on 2 CPU cores.",
    )


def _folder_plan(root: Path, console: Console) -> Plan:
    """The plan for letters with the images of a folder, and with networks and sizes that suit them."""
    files = find_images(root)
    side = min(LARGEST_SIDE, suggest_size([path for group in files.values() for path in group]))
    arguments: dict[str, Any] = {"root": str(root.resolve()), "image_size": side, "batches_per_epoch": 50}
    console.print(f"Reading the images in {root}, at {side} x {side} pixels.")
    limit = max(10, MOST_IMAGES // len(files))
    if any(len(group) > limit for group in files.values()):
        arguments["max_images_per_class"] = limit
        console.print(f"Only {limit} of every class, so that it takes minutes.")
    images = ImageFolderDataModule(**arguments).load()
    count, channels = images.images.shape[:2]
    teacher: dict[str, Any] = {"in_channels": channels}
    student = dict(teacher)
    if channels == 3:
        teacher["widths"], student["widths"] = [32, 64, 128], [8, 16, 32]
    data = {"data": {"class_path": "ImageFolderDataModule", "init_args": arguments}}
    learner = data | {f"{_STUDENT}.{name}": value for name, value in student.items()}
    letters = _letters_plan()
    plan = Plan(
        with_settings(letters.teacher, data | {f"{_STUDENT}.{name}": value for name, value in teacher.items()}),
        with_settings(letters.alone, learner),
        with_settings(
            letters.distilled,
            learner | {f"{_TEACHER}.network.init_args.{name}": value for name, value in teacher.items()},
        ),
        f"{count:,} images of {len(images.class_names)} classes",
        "With three seeds it takes up to 15 minutes on 2 CPU cores.",
        images,
    )
    return plan


def _with_steps(plan: Plan, steps: int) -> Plan:
    settings = {
        "trainer.max_epochs": 1,
        "data.init_args.batches_per_epoch": steps,
        "model.init_args.lr_scheduler.init_args.total_steps": steps,
    }
    teacher, alone, distilled = (with_settings(c, settings) for c in (plan.teacher, plan.alone, plan.distilled))
    return Plan(teacher, alone, distilled, plan.things, f"Each for {steps} steps.", plan.images)


def _train_all(plan: Plan, seeds: Sequence[int], work: Path, console: Console) -> tuple[list[Run], ImageDataModule]:
    weights = {f"{_TEACHER}.weights": str(work / "teacher" / "last.ckpt")}
    jobs = [(TEACHER, plan.teacher, seeds[0], work / "teacher")]
    for seed in seeds:
        jobs.append((ALONE, plan.alone, seed, work / f"alone-{seed}"))
        jobs.append((DISTILLED, with_settings(plan.distilled, weights), seed, work / f"rkd-{seed}"))
    runs: list[Run] = []
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for network, config, seed, folder in jobs:
            bar = _Bar(progress, network if network == TEACHER else f"{network}, seed {seed}", config)
            trained = study.train(config, folder, seed, [bar], plan.images)
            runs.append(study.measure(network, trained, seed, runs[0] if runs else None))
            bar.say(f"recall_at_1 {runs[-1].scores['recall_at_1']:.3f} after {_clock(runs[-1].seconds)}")
            if network == TEACHER:
                module = trained[1]
    return runs, module


class _Bar(pl.Callback):
    """One line of the progress display; where there is no terminal, a line of text every quarter of the way."""

    def __init__(self, progress: Progress, name: str, config: Config) -> None:
        self.steps: int = config["trainer"]["max_epochs"] * config["data"]["init_args"]["batches_per_epoch"]
        self.progress, self.name, self.start = progress, name, time.perf_counter()
        self.task = progress.add_task(name, total=self.steps, news="")
        self.say(f"{self.steps} steps")

    def say(self, news: str) -> None:
        """Show what there is to know."""
        self.progress.update(self.task, news=news)
        if self.progress.disable:
            self.progress.console.print(f"  {self.name}: {news}")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        done = trainer.global_step
        self.progress.update(self.task, completed=done)
        every = max(1, self.steps // 4) if self.progress.disable else 10
        if done % every == 0 and done < self.steps:
            left = (time.perf_counter() - self.start) / done * (self.steps - done)
            self.say(f"{done} of {self.steps} steps, about {_clock(left)} left")


@contextmanager
def _working_folder(out: Path, console: Console) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if all goes well, and vanishes if not."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"the output folder {str(out)!r} is a file; choose another one with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MADE_BY).is_file():
        raise FileExistsError(f"{str(out)!r} holds something that no demo made; choose another folder with --out")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    check_writable(out.parent)
    work = out.parent / f".{out.name}-{os.getpid()}"
    old = work.with_name(f"{work.name}.old")
    work.mkdir()
    try:
        yield work
        if out.exists():
            out.rename(old)
        work.rename(out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        with suppress(OSError):  # something else may have been written there meanwhile
            for parent in new_parents:
                parent.rmdir()
        if isinstance(error, KeyboardInterrupt | SystemExit):  # Lightning answers Ctrl-C with SystemExit
            console.print(f"Stopped. Nothing was written to {out}.")
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_tables(work: Path, runs: Sequence[Run], summaries: Sequence[Summary]) -> None:
    text = study.markdown(summaries, COLUMNS)
    (work / "table.md").write_text(f"{text}\n{AGREEMENT}\n\n{_verdict(runs)}\n", encoding="utf-8")
    study.write_csv(summaries, work / "table.csv")
    study.write_runs_csv(runs, work / "runs.csv")


def _write_pictures(work: Path, runs: Sequence[Run], data: ImageDataModule, things: str) -> None:
    rows = torch.tensor(data.test_set.indices)
    images, labels = data.root.images[rows], data.root.labels[rows]
    first = {run.network: run for run in reversed(runs)}
    shown = {name: first[name] for name in (TEACHER, ALONE, DISTILLED)}
    found = {f"{name}\nrecall@1 {run.scores['recall_at_1']:.2f}": run.embeddings for name, run in shown.items()}
    plots.neighbours(images, labels, found, title=f"The five nearest images, of {things} unseen in training").savefig(
        work / "neighbours.png"
    )
    agreement = {n: f"correlation with the teacher {r.scores['distance_correlation']:.2f}" for n, r in shown.items()}
    seen = {f"{n}\n{'' if n == TEACHER else agreement[n]}": run.embeddings for n, run in shown.items()}
    plots.relations(
        seen, labels, data.class_names, title=f"Distances between images of {things} unseen in training"
    ).savefig(work / "relations.png")


def _write_settings(work: Path, out: Path, seeds: Sequence[int], steps: int | None, data: Path | None) -> None:
    """Say what was done, and let the configurations name the folder in which they will lie."""
    from lightning_rkd import __version__

    for path in work.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump(_moved(config, str(work), str(out)), sort_keys=False), encoding="utf-8")
    settings = {
        "made_by": "lightning-rkd demo",
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
        "data": None if data is None else str(data.resolve()),
        "seeds": list(seeds),
        "steps": steps,
    }
    (work / MADE_BY).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(entry, old, new) for key, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, old, new) for entry in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _table(summaries: Sequence[Summary]) -> Table:
    table = Table()
    table.add_column("network")
    for heading in ("parameters", *COLUMNS):
        table.add_column(heading, justify="right")
    for summary in summaries:
        table.add_row(*study.cells(summary, COLUMNS))
    return table


def _verdict(runs: Sequence[Run]) -> str:
    """What distillation changed, in words."""
    alone, distilled = ([r.scores["recall_at_1"] for r in runs if r.network == name] for name in (ALONE, DISTILLED))
    gains = [100 * (b - a) for a, b in zip(alone, distilled, strict=True)]
    mean = sum(gains) / len(gains)
    seeds = f" (seed by seed: {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"With RKD-DA the student's recall@1 on unseen classes changes by {mean:+.1f} points{seeds}."


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
