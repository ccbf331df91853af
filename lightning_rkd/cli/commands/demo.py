"""``lightning-rkd demo``: a teacher, a student alone, and the same student distilled, tested on unseen classes."""

import argparse
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from lightning_rkd import __version__, plots
from lightning_rkd.cli import recipes
from lightning_rkd.cli.commands import common
from lightning_rkd.cli.commands.compare import FILES, compare
from lightning_rkd.cli.commands.export import load_student
from lightning_rkd.cli.experiments.plan import TEACHER, Comparison, read
from lightning_rkd.cli.experiments.report import render
from lightning_rkd.cli.experiments.runs import digest, embed
from lightning_rkd.cli.experiments.tables import Table
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.data.datamodules.base import ImageDataModule
from lightning_rkd.data.datamodules.folder import ImageFolderDataModule, find_images, suggest_size
from lightning_rkd.models.small import ConvNet
from lightning_rkd.plots.style import to_png
from lightning_rkd.utils import provenance
from lightning_rkd.utils.files import write_whole

ALONE, DISTILLED = "student alone", "student + RKD-DA"

FOLDERS = {ALONE: "alone", DISTILLED: "rkd"}
"""Output folders of the students, which the seed completes."""

MADE_BY = "demo.yaml"
"""File with the settings of a demo in its output folder; a folder that holds the same settings is resumed."""

LARGEST_IMAGE, MOST_IMAGES = 32, 25_000
"""Limits on a folder of images, so that the demo takes minutes."""

_AGREEMENT = "distance_correlation: agreement with the teacher, the rank correlation of distances."


def main(args: Sequence[str]) -> None:
    """Run the command; ``SystemExit(1)`` if a run failed. The same command resumes, to the same table."""
    options = _parser().parse_args(args)
    out, console = options.out, common.new_console()
    with common.resumable("demo", args) as command:
        common.check_folder(out, MADE_BY, "demo")
        recipe = yaml.safe_load(recipes.find("glyphs_teacher").read_text(encoding="utf-8"))
        data: ImageDataModule = GlyphDataModule(**recipe["data"]["init_args"])
        changes: dict[str, Any] = {}
        described, duration = "glyphs of many scripts", "about 4 minutes"
        if options.data is not None:
            data, changes = plan_folder(options.data, console, options.skip_damaged)
            described = f"{len(data.root.images):,} images of {len(data.class_names)} classes"
            duration = "up to 15 minutes"
        comparison = plan(options.seeds, options.steps, changes)
        if common.begin(out, MADE_BY, _settings(options, data), "demo"):
            console.print(f"Resuming the demo in {out}.", soft_wrap=True)
        console.print(
            f"Data: {described}. All networks are tested on classes that none of them has seen in training.\n"
            f"Training one teacher, and for each of {len(options.seeds)} seeds a student alone and the same student "
            "with RKD-DA." + ("" if options.steps else f" With three seeds it takes {duration} on 2 CPU cores.")
        )
        table = compare(comparison, out, console, command)
        if not table.failures:
            words = f"{_AGREEMENT}\n{_verdict(table)}\n"
            console.print(f"{words}Drawing the pictures.")
            write_whole(out / "table.md", (out / "table.md").read_bytes() + f"\n{words}".encode())
            things = "glyphs" if options.data is None else "classes"
            embeddings = _embed(comparison, data, out)
            light, dark = (_draw(embeddings, table, data, things, dark) for dark in (False, True))
            for name in ("neighbours", "relations"):
                write_whole(out / f"{name}.png", to_png(light[name]))
            page = render(
                [table.headings, *map(table.cells, table.rows)],
                [_verdict(table), table.caption, _AGREEMENT],
                light,
                dark,
                data=described,
                command=command,
                student=str(out / f"rkd-{options.seeds[-1]}"),
                made=f"{datetime.date.today()}, {provenance.hardware('cpu')}, PyTorch {torch.__version__}, "
                f"lightning-rkd {__version__}",
            )
            write_whole(out / "report.html", page.encode())
            files = {
                "report.html": "table and pictures in one page for a browser",
                "neighbours.png": "queries, and the nearest images that the networks find",
                "relations.png": "distances between images in the networks' embeddings",
            }
            common.print_files(console, out, files | FILES)
    if table.failures:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = common.new_parser(
        "demo",
        "Train a teacher, a student alone and the same student with relational distillation (RKD-DA), and compare them "
        "on classes that none of them has seen. The same command resumes an interrupted demo.",
        """\
examples:
  lightning-rkd demo
  lightning-rkd demo --data photos --seeds 5 --out runs/photos""",
    )
    add = parser.add_argument
    images = "images, each in a folder that is its class (default: glyphs of many scripts, no download)"
    add("--data", type=Path, metavar="FOLDER", help=images)
    add("--skip-damaged", action="store_true", help="leave out images of --data that cannot be read")
    number = "number of seeds, or their list (default: 3, the same as 0,1,2)"
    add("--seeds", type=common.seeds, default=(0, 1, 2), metavar="N|LIST", help=number)
    add("--steps", type=common.positive, metavar="N", help="training steps of each network")
    add("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="output folder (default: runs/demo)")
    return parser


def plan(seeds: Sequence[int], steps: int | None = None, changes: Mapping[str, Any] | None = None) -> Comparison:
    """The comparison ``glyphs_demo``, with changes; the teacher has the first of the seeds."""
    changes = {"seeds": seeds, "teacher.seed": seeds[0], "baseline": None, **(changes or {})}
    found = read(recipes.find("glyphs_demo", "comparison"), steps, changes=changes)
    return replace(found, networks=tuple(replace(n, folder=FOLDERS[n.name]) for n in found.networks))


def plan_folder(root: Path, console: Console, skip_damaged: bool = False) -> tuple[ImageDataModule, dict[str, Any]]:
    """The images of a folder, and the changes of the comparison that suit them."""
    files = find_images(root, skip_damaged)
    size = min(LARGEST_IMAGE, suggest_size([path for group in files.values() for path in group]))
    arguments: dict[str, Any] = {"root": str(root.resolve()), "image_size": size, "batches_per_epoch": 50}
    console.print(f"Reading the images in {root}, at {size} x {size} pixels.")
    if skip_damaged:
        arguments["skip_damaged"] = True
    limit = max(10, MOST_IMAGES // len(files))
    if any(len(group) > limit for group in files.values()):
        arguments["max_images_per_class"] = limit
        console.print(f"Only {limit} of every class, so that it takes minutes.")
    data = ImageFolderDataModule(**arguments)
    data.setup()
    channels = data.image_shape[0]
    shared: dict[str, Any] = {
        "data": {"class_path": "ImageFolderDataModule", "init_args": arguments},
        "model.student.in_channels": channels,
    }
    teacher, student = dict(shared), dict(shared)
    if channels == 3:
        teacher["model.student.widths"], student["model.student.widths"] = [32, 64, 128], [8, 16, 32]
    few = {"class_path": "RelationalAgreement", "init_args": {"k": min(10, len(data.test_set) - 1)}}
    student["model.metrics.agreement"] = few
    changes = {"title": f"Relational distillation on unseen classes of {root}", "teacher.set": teacher}
    return data, changes | {f"networks.{name}.set": student for name in FOLDERS}


def _settings(options: argparse.Namespace, data: ImageDataModule) -> dict[str, Any]:
    images = None if options.data is None else data.root.images
    return {
        "made_by": "lightning-rkd demo",
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
        "data": None if options.data is None else str(options.data.resolve()),
        "images": None if images is None else digest(images[torch.arange(len(images))]),
        "seeds": list(options.seeds),
        "steps": options.steps,
    }


def _verdict(table: Table) -> str:
    """Effect of distillation in words."""
    alone, distilled = (row.values["recall_at_1"] for row in table.rows if row.network in FOLDERS)
    gains = [100 * (distilled[seed] - alone[seed]) for seed in alone]
    seeds = f" (seed by seed: {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    mean = sum(gains) / len(gains)
    return f"With RKD-DA the student's recall@1 on unseen classes changes by {mean:+.1f} points{seeds}."


def _embed(comparison: Comparison, data: ImageDataModule, out: Path) -> dict[str, Tensor]:
    """Embeddings of the test data, of the networks of the first seed."""
    data.prepare_data()
    data.setup("test")
    assert comparison.teacher is not None
    found = {}
    for network in (comparison.teacher, *comparison.networks):
        student = ConvNet(**network.config["model"]["init_args"]["student"]["init_args"])
        folder = out / (TEACHER if network.name == TEACHER else f"{network.folder}-{comparison.seeds[0]}")
        load_student(student, folder / "last.ckpt")
        found[network.name] = embed(student, data.test_dataloader())[0]
    return found


def _draw(
    embeddings: Mapping[str, Tensor], table: Table, data: ImageDataModule, things: str, dark: bool
) -> dict[str, Figure]:
    rows = torch.tensor(data.test_set.indices)
    images, labels = data.root.images[rows], data.root.labels[rows]
    scored, agreeing = {}, {}
    for row in table.rows:
        first = {score: next(iter(values.values())) for score, values in row.values.items()}
        correlation = first.get("distance_correlation")  # none of the teacher's
        agreement = "" if correlation is None else f"correlation with the teacher {correlation:.2f}"
        scored[f"{row.network}\nrecall@1 {first['recall_at_1']:.2f}"] = embeddings[row.network]
        agreeing[f"{row.network}\n{agreement}"] = embeddings[row.network]
    unseen = f"of {things} unseen in training"
    return {
        "neighbours": plots.neighbours(images, labels, scored, title=f"The five nearest images, {unseen}", dark=dark),
        "relations": plots.relations(
            agreeing, labels, data.class_names, title=f"Distances between images {unseen}", dark=dark
        ),
        "angles": plots.angles(embeddings, title=f"Angles between images {unseen}", dark=dark),
        "map": plots.embedding_map(images, labels, scored, title=f"Maps of images {unseen}", dark=dark),
    }
