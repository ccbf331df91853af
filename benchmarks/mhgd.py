"""MHGD on photographs: a student alone and with the attention graph of its teacher, same batches, several seeds.

Run ``python benchmarks/mhgd.py --data cifar100/train``, where the folder holds a folder of images per class; it writes
``docs/mhgd_on_cifar100.md``. An interrupted run resumes: finished trainings are kept in ``--out``.

Teacher, estimator and student are those of the recipes ``cifar100_mhgd_teacher``, ``cifar100_mhgd_estimator`` and
``cifar100_mhgd_student`` with fewer classes, channels and steps; the student alone is the third without teacher and
loss. Nothing is tuned. With each seed both students begin with the same weights, which is checked, and see the same
batches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_rkd import losses
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import train
from lightning_rkd.cli.experiments.settings import with_settings
from lightning_rkd.data.datamodules.base import ImageDataModule
from lightning_rkd.data.datamodules.folder import ImageFolderDataModule
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.functional.channels import flatten_positions
from lightning_rkd.functional.singular import right_singular_vectors
from lightning_rkd.models import Classified, ConvNet
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.utils.types import Batch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mhgd_on_cifar100.md"
EPOCH = 100  # batches, as in the recipes
ALONE, MHGD = "alone", "mhgd"
Row = dict[str, Any]


class Start(pl.Callback):
    """A number that tells initial weights apart."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = float(sum(p.detach().double().abs().sum() for p in pl_module.student.parameters()))


def some_classes(root: Path, number: int, folder: Path) -> Path:
    """A folder of links to the first classes in alphabetical order."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir())[:number]
    if len(names) < number:
        raise SystemExit(f"{root} holds {len(names)} folders of images, but --classes is {number}")
    folder.mkdir(exist_ok=True)
    for name in names:
        link = folder / name
        if not link.is_symlink():
            link.symlink_to((root / name).resolve(), target_is_directory=True)
    return folder


def configured(name: str, args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """A recipe with our classes, channels and steps."""
    config: dict[str, Any] = yaml.safe_load((recipes.FOLDER / f"cifar100_mhgd_{name}.yaml").read_text())
    epoch = max(1, min(EPOCH, steps))
    settings: dict[str, Any] = {
        "data.init_args.root": str(args.out / "images"),
        "data.init_args.max_images_per_class": args.images_per_class,
        "data.init_args.test": args.test,
        "data.init_args.batches_per_epoch": epoch,
        "trainer.max_epochs": steps // epoch,
        "trainer.accelerator": "cpu",
    }
    model = config["model"]["init_args"]
    if "student" in model:
        settings |= {
            "model.init_args.student.init_args.num_classes": args.classes,
            "model.init_args.student.init_args.backbone.init_args.widths": args.widths,
            "model.init_args.metrics.accuracy.init_args.num_classes": args.classes,
            "model.init_args.lr_scheduler.init_args.total_steps": steps,
        }
    if "teacher" in model:
        settings |= {
            "model.init_args.teacher.init_args.network.init_args.num_classes": args.classes,
            "model.init_args.teacher.init_args.network.init_args.backbone.init_args.widths": args.widths,
            "model.init_args.teacher.init_args.weights": str(args.out / "teacher" / "last.ckpt"),
        }
    if "loss" in model:
        settings["model.init_args.loss.init_args.estimator"] = str(args.out / "estimator" / "last.ckpt")
    return with_settings(config, settings)


def tested(module: pl.LightningModule, data: ImageDataModule) -> dict[str, float]:
    """Metrics of ``lightning-rkd test``."""
    return dict(module.trainer.test(module, datamodule=data, verbose=False)[0])


def accurate(module: pl.LightningModule, data: ImageDataModule, seconds: float) -> Row:
    return {
        "accuracy": tested(module, data)["test/accuracy"],
        "parameters": count_parameters(module.student),
        "seconds": seconds,
        "train": len(data.train_set),
        "test": len(data.test_set),
    }


def teacher(args: argparse.Namespace) -> Row:
    """Train the teacher."""
    return accurate(*train(configured("teacher", args, args.teacher_steps), args.out / "teacher", 0))


def mixed(data: ImageDataModule) -> DataLoader[Any]:
    """The test images in batches of all classes, as in training; the data module's own come class by class."""
    order = torch.randperm(len(data.test_set), generator=torch.Generator().manual_seed(0)).tolist()
    return DataLoader(Subset(data.test_set, order), data.eval_batch_size)


@torch.no_grad()
def vectors(network: Teacher, loader: Iterable[Any]) -> list[Tensor]:
    """The first singular vectors of the teacher's stages."""
    parts = []
    for images, _ in loader:
        maps = network(Batch(inputs=images))[""].feature_maps or []
        parts.append([right_singular_vectors(flatten_positions(m)).squeeze(2) for m in maps])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def constant_error(module: Any, data: ImageDataModule) -> float:
    """The cosine error of a single direction per stage, the mean of the training images, on the test images."""
    module.teacher.attach(module.teacher_layer)
    try:
        seen = vectors(module.teacher, DataLoader(Subset(data.root, data.train_set.indices), data.eval_batch_size))
        unseen = vectors(module.teacher, mixed(data))
    finally:
        module.teacher.detach()
    errors = [1 - (v @ F.normalize(u.mean(0), dim=0)).mean() for u, v in zip(seen[1:], unseen[1:], strict=True)]
    return float(torch.stack(errors).mean())


def estimator(args: argparse.Namespace) -> Row:
    """Train the attention graph; the cosine errors on test images before and after."""
    row: Row = {}
    for name, steps in (("untrained", 0), ("trained", args.estimator_steps)):
        module, data, seconds = train(configured("estimator", args, steps), args.out / "estimator", 0)
        by_class = tested(module, data)["test/cosine_error"]
        by_chance = module.trainer.test(module, dataloaders=mixed(data), verbose=False)[0]["test/cosine_error"]
        row |= {name: by_chance, f"{name}_by_class": by_class, "seconds": seconds}
    return row | {"constant": constant_error(module, data), "batch": data.eval_batch_size}


def student(args: argparse.Namespace, way: str, seed: int) -> Row:
    """Train a student."""
    config, start = configured("student", args, args.student_steps), Start()
    if way == ALONE:
        config["model"]["class_path"] = "DistillationModule"
        for key in ("teacher", "teacher_layer", "loss"):
            del config["model"]["init_args"][key]
    row = accurate(*train(config, args.out / f"{way}_{seed}", seed, [start]))
    return row | {"start": start.weights}


@torch.no_grad()
def graphs(args: argparse.Namespace) -> Row:
    """Divergence of the students' attention graphs from the teacher's on test images: the loss, mean over rows."""
    config = configured("student", args, args.student_steps)
    data = ImageFolderDataModule(**config["data"]["init_args"])
    data.setup()
    loss = losses.MHGD(args.out / "estimator" / "last.ckpt", reduction="mean")
    loss.prepare()

    def maps(settings: dict[str, Any], layer: dict[str, Any], folder: Path) -> list[list[Tensor]]:
        backbone = ConvNet(**settings["init_args"]["backbone"]["init_args"])
        network = Teacher(Classified(backbone, args.classes), folder / "last.ckpt")
        network.attach(layer["feature_maps"])
        return [network(Batch(inputs=images))[""].feature_maps or [] for images, _ in mixed(data)]

    model = config["model"]["init_args"]
    expected = maps(model["teacher"]["init_args"]["network"], model["teacher_layer"], args.out / "teacher")
    row: Row = {}
    for way in (ALONE, MHGD):
        row[way] = []
        for seed in range(args.seeds):
            found = maps(model["student"], model["student_layer"], args.out / f"{way}_{seed}")
            values = [float(loss(s, t)) for s, t in zip(found, expected, strict=True)]
            row[way].append(statistics.fmean(values))
    return row


def kept(args: argparse.Namespace, name: str, run: Callable[..., Row], *more: Any) -> Row:
    """The result of a run, from its file if it has been there before."""
    file = args.out / f"{name}.json"
    keys = ["classes", "images_per_class", "test", "widths", "teacher_steps"]
    keys += ["estimator_steps"] if run is not teacher else []
    keys += ["student_steps"] if run in (student, graphs) else []
    keys += ["seeds"] if run is graphs else []
    settings = {key: getattr(args, key) for key in keys}
    if file.exists():
        known = json.loads(file.read_text())
        if known["settings"] != settings:
            raise SystemExit(f"{file} was written with {known['settings']}, not {settings}: choose another --out")
        return dict(known["row"])
    row = run(args, *more)
    file.write_text(json.dumps({"settings": settings, "row": row}))
    print(f"{name}: {row}", flush=True)
    return row


def points(values: Sequence[float]) -> str:
    """Mean and spread (standard deviation), in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.2f} ± {100 * spread:.2f}"


def verdict(differences: Sequence[float]) -> str:
    """Summary of the paired differences."""
    low, high = 100 * min(differences), 100 * max(differences)
    seeds = len(differences)
    if low > 0:
        return f"MHGD helped here with each of the {seeds} seeds, by {low:.2f} to {high:.2f} points."
    if high < 0:
        return f"MHGD did not help here: it lost {-high:.2f} to {-low:.2f} points, with each of the {seeds} seeds."
    return (
        f"MHGD did not help reliably here: from seed to seed the difference lies between {low:+.2f} and {high:+.2f} "
        "points, so no gain can be claimed."
    )


def page(args: argparse.Namespace, of_teacher: Row, graph: Row, rows: dict[str, list[Row]], distances: Row) -> str:
    """The table, and what it says."""
    accuracies = {way: [row["accuracy"] for row in group] for way, group in rows.items()}
    differences = [b - a for a, b in zip(accuracies[ALONE], accuracies[MHGD], strict=True)]
    test, mean = of_teacher["test"], statistics.fmean(accuracies[ALONE])
    noise = 100 * (mean * (1 - mean) / test) ** 0.5
    slower = statistics.fmean(b["seconds"] / a["seconds"] for a, b in zip(rows[ALONE], rows[MHGD], strict=True))
    nearer = statistics.fmean(distances[MHGD]) / statistics.fmean(distances[ALONE])
    seeds, widths = range(args.seeds), ", ".join(map(str, args.widths))
    better = "better" if graph["trained"] < graph["constant"] else "no better"
    lines = [
        "# MHGD on CIFAR-100",
        "",
        f"Written by `{args.command}` on {datetime.date.today()}; {platform.machine()}, {os.cpu_count()} cores, one of "
        f"them used, no accelerator, PyTorch {torch.__version__}.",
        "",
        f"The first {args.classes} classes of the training images in alphabetical order, at most "
        f"{args.images_per_class} images of each: {of_teacher['train']} to train with, {test} to test with, the "
        "others held back and not used. The networks are those of the recipes `cifar100_mhgd_teacher`, "
        f"`cifar100_mhgd_estimator` and `cifar100_mhgd_student` with stages of {widths} channels (the teacher's have "
        "three convolutions each, the student's one), trained in batches of 128: the teacher for "
        f"{args.teacher_steps} steps, the graph for {args.estimator_steps}, every student for {args.student_steps}. "
        "Rates, weights and everything else are the recipes'; nothing was tuned. With the same seed both students "
        "begin with the same weights and see the same batches. The teacher and the graph were trained once, with seed "
        "0.",
        "",
        "## Students",
        "",
        "Accuracy on test images, in percent; mean ± standard deviation of the seeds.",
        "",
        f"| network | parameters | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        f"|---|---:|{'---:|' * args.seeds}---:|",
        f"| teacher | {of_teacher['parameters']:,} | {100 * of_teacher['accuracy']:.2f} |{' |' * (args.seeds - 1)} |",
    ]
    for way, title in ((ALONE, "student alone"), (MHGD, "student with MHGD")):
        cells = " | ".join(f"{100 * a:.2f}" for a in accuracies[way])
        lines.append(f"| {title} | {rows[way][0]['parameters']:,} | {cells} | {points(accuracies[way])} |")
    cells = " | ".join(f"{100 * d:+.2f}" for d in differences)
    lines += [
        f"| difference | | {cells} | {points(differences)} |",
        "",
        f"{verdict(differences)} The standard error of one accuracy on {test} images is about {noise:.1f} points, and "
        f"{args.seeds} seeds of a short training on a small part of the data say little about a long one on all of it. "
        f"A training with MHGD took {slower:.1f} times as long as one without, by the clock of a machine that may have "
        "had other work.",
        "",
        "Whether the students learnt the teacher's graphs: the divergence from them on test images (the loss with "
        f'`reduction="mean"`). With MHGD it is {nearer:.2f} times what it is without.',
        "",
        f"| network | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        f"|---|{'---:|' * args.seeds}",
        *(
            f"| {title} | {' | '.join(f'{value:.3f}' for value in distances[way])} |"
            for way, title in ((ALONE, "student alone"), (MHGD, "student with MHGD"))
        ),
        "",
        "## Attention graph",
        "",
        "One minus the cosine between a stage's singular vectors and their estimates, which the graph makes from the "
        f"stage before; mean over the pairs of stages, on test images in batches of {graph['batch']}.",
        "",
        "| estimate | batches of all classes | class by class |",
        "|---|---:|---:|",
        f"| graph, untrained | {graph['untrained']:.4f} | {graph['untrained_by_class']:.4f} |",
        f"| graph, trained | {graph['trained']:.4f} | {graph['trained_by_class']:.4f} |",
        f"| one constant direction per stage | {graph['constant']:.4f} | {graph['constant']:.4f} |",
        "",
        "The constant direction is the mean of the training images' vectors and looks at no test image: the trained "
        f"graph estimates {better} than that. (It is computed from both stages, so it has seen what it estimates, as "
        "the method has it.) Class by class is the order in which `lightning-rkd test` reads the "
        "images; a graph relates the images of a batch, and learns on batches of all classes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("cifar100/train"), help="folder of a folder per class")
    parser.add_argument("--out", type=Path, default=Path("runs/mhgd"))
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--images-per-class", type=int, default=500)
    parser.add_argument("--test", type=float, default=0.2, help="part of the images that test")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="channels of the three stages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--estimator-steps", type=int, default=400)
    parser.add_argument("--student-steps", type=int, default=1000)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"there is no folder {args.data}: unpack CIFAR-100 as one folder of images per class, and name it")
    args.command = shlex.join(["python", "benchmarks/mhgd.py", *sys.argv[1:]])
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    some_classes(args.data, args.classes, args.out / "images")
    of_teacher = kept(args, "teacher", teacher)
    graph = kept(args, "estimator", estimator)
    rows: dict[str, list[Row]] = {ALONE: [], MHGD: []}
    for seed in range(args.seeds):
        for way, group in rows.items():
            group.append(kept(args, f"{way}_{seed}", student, way, seed))
        if rows[ALONE][-1]["start"] != rows[MHGD][-1]["start"]:
            raise SystemExit(f"the students of seed {seed} began with different weights")
    args.page.write_text(page(args, of_teacher, graph, rows, kept(args, "graphs", graphs)), encoding="utf-8")
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
