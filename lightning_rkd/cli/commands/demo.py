"""``lightning-rkd demo``: a teacher, a student alone, and the same student distilled, on unseen classes."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_rkd import plots
from lightning_rkd.cli import recipes
from lightning_rkd.cli.commands import options as kinds
from lightning_rkd.cli.experiments import report, summaries
from lightning_rkd.cli.experiments import runs as study
from lightning_rkd.cli.experiments.progress import Line, clock, display
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.settings import Config, with_settings, with_steps
from lightning_rkd.cli.experiments.summaries import Summary
from lightning_rkd.cli.trainer import check_writable
from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.folder import ImageFolderDataModule, find_images, suggest_size
from lightning_rkd.utils import provenance
from lightning_rkd.utils.files import write_whole

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student + RKD-DA"

COLUMNS = ("recall_at_1", "map_at_r", "distance_correlation", "seconds")
"""Columns of the table, after name and number of parameters."""

AGREEMENT = "distance_correlation: agreement with the teacher, the rank correlation of distances."

MADE_BY = "demo.yaml"
"""The file that says what a demo does; a folder that holds it is gone on with, if it says the same."""

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

    @property
    def name(self) -> str:
        """Of what is tested, in titles."""
        return "letters" if self.images is None else "classes"


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: Data that cannot be used.
        OSError: An output folder that cannot be written, or that holds something else.
    """
    options = _parser().parse_args(args)
    command = shlex.join(["lightning-rkd", "demo", *args])
    try:
        demo(options.out, options.seeds, options.steps, options.data, command)
    except (KeyboardInterrupt, SystemExit):  # Lightning answers Ctrl-C with SystemExit
        print(f"Stopped. The same command goes on from here: {command}")
        raise


def demo(
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    data: Path | None = None,
    command: str = "lightning-rkd demo",
) -> None:
    """Train, compare, print the table, and leave table, pictures, checkpoints and configurations in a folder.

    What was interrupted goes on when the same is asked for again: networks that were finished are not trained again,
    and the one that was under way goes on from its last epoch.

    Args:
        out: Output folder: a new one, or one that the same demo has begun or finished.
        seeds: Of the students. The teacher has the first of them.
        steps: Of each network; ``None`` takes what suits the data.
        data: Folder of images, a class being the folder that directly holds them; ``None`` takes letters.
        command: What the report says it was made by.

    Raises:
        ValueError: The data cannot be used.
        OSError: ``out`` cannot be written, or holds another demo or something that no demo made.
    """
    console, start = Console(highlight=False, width=None if sys.stdout.isatty() else 100), time.perf_counter()
    kinds.check_folder(out, MADE_BY, "demo")
    plan = _letters_plan() if data is None else _folder_plan(data, console)
    plan = plan if steps is None else _with_steps(plan, steps)
    if _begin(out, _settings(seeds, steps, data, plan.images)):
        console.print(f"Going on with what {out} holds.")
    console.print(
        f"Data: {plan.things}. All networks are tested on classes that none of them has seen in training.\n"
        f"Now training one teacher, and for each of {len(seeds)} seeds a student alone and the same student with "
        f"RKD-DA. {plan.duration}"
    )
    runs = _train_all(plan, seeds, out, console)
    found = summaries.summarise(runs)
    _write_tables(out, runs, found)
    module = study.prepare(plan.teacher, out / "teacher", seeds[0], images=plan.images).datamodule
    module.setup("test")
    console.print("Drawing the pictures.")
    _write_pictures(out, runs, found, module, plan, command)
    console.print(_table(found))
    console.print(f"{AGREEMENT}\n{_verdict(runs)}")
    console.print(f"It took {clock(time.perf_counter() - start)}. In {out} there are now")
    for names, what in (
        ("table.md, table.csv, runs.csv", "the table, and every single run"),
        ("report.html", "all of this in one page, with pictures: open it in a browser"),
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
        "--seeds", type=kinds.seeds, default=(0, 1, 2), metavar="N|LIST", help="how many seeds (3), or which (0,1,2)"
    )
    parser.add_argument("--steps", type=kinds.positive, metavar="N", help="training steps of each network")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where results go (runs/demo)"
    )
    return parser


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
    teacher, alone, distilled = (with_steps(c, steps) for c in (plan.teacher, plan.alone, plan.distilled))
    return Plan(teacher, alone, distilled, plan.things, f"Each for {steps} steps.", plan.images)


def _train_all(plan: Plan, seeds: Sequence[int], out: Path, console: Console) -> list[Run]:
    weights = {f"{_TEACHER}.weights": str(out / "teacher" / "last.ckpt")}
    jobs = [(TEACHER, plan.teacher, seeds[0], out / "teacher")]
    for seed in seeds:
        jobs.append((ALONE, plan.alone, seed, out / f"alone-{seed}"))
        jobs.append((DISTILLED, with_settings(plan.distilled, weights), seed, out / f"rkd-{seed}"))
    runs: list[Run] = []
    with display(console) as progress:
        for network, config, seed, folder in jobs:
            bar = _Bar(progress, network if network == TEACHER else f"{network}, seed {seed}", config)
            runs.append(study.run(network, config, folder, seed, runs[0] if runs else None, [bar], plan.images))
            bar.line.end(f"recall_at_1 {runs[-1].scores['recall_at_1']:.3f} after {clock(runs[-1].seconds)}")
    return runs


class _Bar(pl.Callback):
    """Shows how far a network's training has come."""

    def __init__(self, progress: Progress, name: str, config: Config) -> None:
        self.name = name
        self.line = Line(
            progress, name, config["trainer"]["max_epochs"] * config["data"]["init_args"]["batches_per_epoch"]
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on."""
        self.line.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self.line.advance(trainer.global_step)


def _settings(
    seeds: Sequence[int], steps: int | None, data: Path | None, images: LabelledImages | None
) -> dict[str, Any]:
    """What a demo is told, and what it runs on."""
    from lightning_rkd import __version__

    return {
        "made_by": "lightning-rkd demo",
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
        "data": None if data is None else str(data.resolve()),
        "images": None if images is None else study.digest(images.images[torch.arange(len(images.images))]),
        "seeds": list(seeds),
        "steps": steps,
    }


def _begin(out: Path, settings: Mapping[str, Any]) -> bool:
    """Write the settings into a new folder, or find that they are those of an old one (True)."""
    check_writable(out)
    path = out / MADE_BY
    if not path.exists():
        write_whole(path, yaml.safe_dump(dict(settings), sort_keys=False).encode())
        return False
    theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
    theirs = theirs if isinstance(theirs, dict) else {}
    if other := [f"{k} {theirs.get(k)} there, {v} now" for k, v in settings.items() if theirs.get(k) != v]:
        raise FileExistsError(
            f"{str(out)!r} holds a demo with other settings ({'; '.join(other)}): choose another folder with --out, or "
            "delete that one"
        )
    return True


def _write_tables(out: Path, runs: Sequence[Run], found: Sequence[Summary]) -> None:
    text = summaries.markdown(found, COLUMNS)
    write_whole(out / "table.md", f"{text}\n{AGREEMENT}\n\n{_verdict(runs)}\n".encode())
    summaries.write_csv(found, out / "table.csv")
    summaries.write_runs_csv(runs, out / "runs.csv")


def _write_pictures(
    out: Path, runs: Sequence[Run], found: Sequence[Summary], data: ImageDataModule, plan: Plan, command: str
) -> None:
    """Two pictures as files, and all of them in the report."""
    light, dark = (_figures(runs, data, plan.name, dark) for dark in (False, True))
    for name in ("neighbours", "relations"):
        write_whole(out / f"{name}.png", report.png(light[name]))
    page = report.report(
        "What the student learned from its teacher",
        [
            f"A big network, the teacher, was trained on {plan.things}; then a small one alone, and the same small one "
            "with relational distillation (RKD-DA): beside its own task it learned to see the distances and angles "
            "between images that the teacher sees. All are tested on classes that none of them has seen.",
        ],
        ["network", "parameters", *COLUMNS],
        [summaries.cells(summary, COLUMNS) for summary in found],
        [_verdict(runs), AGREEMENT],
        [report.Picture(heading, text, light[name], dark[name]) for name, (heading, text) in _SECTIONS.items()],
        {
            "This report again; what is finished is not trained again:": command,
            "The same on images of yours, each in a folder that is its class:": "lightning-rkd demo --data FOLDER",
            "The distilled student alone, for production (ONNX and more):": (
                f"lightning-rkd export {out / f'rkd-{runs[-1].seed}'} --out exported"
            ),
            "Other losses, compared over seeds:": "lightning-rkd compare --config glyphs_losses",
        },
        f"{datetime.date.today()}, {provenance.hardware('cpu')}, PyTorch {torch.__version__}, lightning-rkd "
        f"{version('lightning-rkd')}",
    )
    write_whole(out / "report.html", page.encode())


_SECTIONS = {
    "neighbours": (
        "The nearest images",
        "Each row asks with one image and shows the five that every network finds nearest to it. A blue frame with a "
        "check mark is right: an image of the same class.",
    ),
    "relations": (
        "Distances",
        "How far apart the networks see the same images, class by class. The more a student's matrix looks like the "
        "teacher's, the more of its geometry has been learned: this is what RKD-D compares.",
    ),
    "angles": (
        "Angles",
        "How large the angles are that each network sees between triplets of images: this is what RKD-A compares. Rows "
        "of independent random numbers would show angles around 60 degrees.",
    ),
    "map": (
        "Maps",
        "Every image at its place on the two main axes of the embedding. The students' maps are turned onto the "
        "teacher's; the colour of a frame is the class.",
    ),
}


def _figures(runs: Sequence[Run], data: ImageDataModule, things: str, dark: bool) -> dict[str, Figure]:
    rows = torch.tensor(data.test_set.indices)
    images, labels = data.root.images[rows], data.root.labels[rows]
    first = {run.network: run for run in reversed(runs)}
    shown = {name: first[name] for name in (TEACHER, ALONE, DISTILLED)}
    plain = {name: run.embeddings for name, run in shown.items()}
    scored = {f"{name}\nrecall@1 {run.scores['recall_at_1']:.2f}": run.embeddings for name, run in shown.items()}
    agreement = {n: f"correlation with the teacher {r.scores['distance_correlation']:.2f}" for n, r in shown.items()}
    agreeing = {f"{n}\n{'' if n == TEACHER else agreement[n]}": run.embeddings for n, run in shown.items()}
    unseen = f"of {things} unseen in training"
    return {
        "neighbours": plots.neighbours(images, labels, scored, title=f"The five nearest images, {unseen}", dark=dark),
        "relations": plots.relations(
            agreeing, labels, data.class_names, title=f"Distances between images {unseen}", dark=dark
        ),
        "angles": plots.angles(plain, title=f"Angles between images {unseen}", dark=dark),
        "map": plots.embedding_map(images, labels, scored, title=f"Maps of images {unseen}", dark=dark),
    }


def _table(found: Sequence[Summary]) -> Table:
    table = Table()
    table.add_column("network")
    for heading in ("parameters", *COLUMNS):
        table.add_column(heading, justify="right")
    for summary in found:
        table.add_row(*summaries.cells(summary, COLUMNS))
    return table


def _verdict(runs: Sequence[Run]) -> str:
    """What distillation changed, in words."""
    alone, distilled = ([r.scores["recall_at_1"] for r in runs if r.network == name] for name in (ALONE, DISTILLED))
    gains = [100 * (b - a) for a, b in zip(alone, distilled, strict=True)]
    mean = sum(gains) / len(gains)
    seeds = f" (seed by seed: {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"With RKD-DA the student's recall@1 on unseen classes changes by {mean:+.1f} points{seeds}."
