"""``lightning-rkd cache``: ask the teacher of a recipe once about every sample, and keep what it shows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_rkd.cli import recipes
from lightning_rkd.cli.trainer import TrainingCLI, check_writable
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.distillation.teachers import BaseTeacher, CachedTeacher, Teacher
from lightning_rkd.distillation.teachers.cache_writer import Dtype, fill
from lightning_rkd.utils.distributed import rank_and_size


def main(args: Sequence[str]) -> None:
    """Run the command."""
    own, rest = _parser().parse_known_args(list(args))
    if not own.config:
        raise argparse.ArgumentError(
            None, "cache needs a recipe with teacher and data: lightning-rkd cache --config RECIPE"
        )
    if own.views is not None:
        rest.append(f"--data.views={own.views}")
    given = [part for name in own.config for part in ("--config", name)]
    with _joined():
        _cache(own, [*recipes.resolve(given), *rest, "--trainer.logger=false", "--trainer.enable_checkpointing=false"])


def _cache(own: argparse.Namespace, config: list[str]) -> None:
    cli = TrainingCLI(config, run=False)
    face = _face(cli)
    teacher, folder, layer = face.distiller.teacher, own.out, face.distiller.teacher_layer
    dtype: Dtype = own.dtype or "float32"
    if isinstance(teacher, CachedTeacher):
        folder, dtype, teacher = folder or teacher.path, own.dtype or teacher.dtype, teacher.teacher
    if not isinstance(teacher, Teacher):
        raise argparse.ArgumentError(
            None,
            f"the recipe has no single teacher whose outputs could be kept, but {_named(teacher)}: name a network, a "
            "Teacher, or a CachedTeacher with one inside",
        )
    folder = Path(folder or Path(cli.trainer.default_root_dir, "teacher_cache"))
    check_writable(folder)
    device = cli.trainer.strategy.root_device
    data = cli.datamodule if cli.datamodule is not None else cli.model
    data.prepare_data()
    data.setup("fit")
    teacher.attach(layer)
    try:
        teacher.to(device)
        with _progress() as advance:
            done = fill(
                folder,
                teacher,
                layer,
                data.train_dataloader(),
                to_batch=lambda batch: to_batch(batch, face.unpack),
                dtype=dtype,
                device=device,
                batch_size=own.batch_size,
                shard_rows=own.shard_rows,
                overwrite=own.overwrite,
                advance=advance,
            )
    finally:
        teacher.detach()
    if rank_and_size()[0] == 0:
        print(f"{'written' if done else 'nothing to do, the cache is there and sound'}: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-rkd cache",
        description="Ask the teacher of a recipe once about every row of the data set, and keep what it shows for "
        "CachedTeacher. An interrupted run goes on where it was; a finished one is verified. Under torchrun the "
        "processes share the work.",
        epilog="Any other option changes the recipe, as for fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", metavar="RECIPE", action="append", help="recipe with teacher and data")
    parser.add_argument("--out", type=Path, help="folder (default: CachedTeacher's, or teacher_cache in the run's)")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="how numbers are kept (default: float32)")
    parser.add_argument("--views", type=int, help="augmented views of each image, for data modules that have views")
    parser.add_argument("--batch_size", type=int, default=128, help="images that the teacher sees at once")
    parser.add_argument("--shard_rows", type=int, default=8192, help="rows in a file, which are lost when interrupted")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is in the folder")
    return parser


def _face(cli: TrainingCLI) -> Any:
    """Whichever face of the recipe distils."""
    faces = [x for x in (cli.model, *cli.trainer.callbacks) if hasattr(x, "distiller")]  # type: ignore[attr-defined]
    faces = [face for face in faces if face.distiller.teacher is not None]
    if len(faces) != 1:
        raise argparse.ArgumentError(None, f"the recipe must have one teacher to cache, and it has {len(faces)}")
    return faces[0]


def _named(teacher: BaseTeacher | None) -> str:
    return "a CachedTeacher without one inside" if teacher is None else type(teacher).__name__


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    shown = console.is_terminal and rank_and_size()[0] == 0
    columns = (TextColumn("asking the teacher"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, rows: progress.update(task, completed=done * rank_and_size()[1], total=rows)


@contextmanager
def _joined() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
