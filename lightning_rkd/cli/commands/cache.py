"""``lightning-rkd cache``: write the teacher's outputs of a recipe for every sample, for ``CachedTeacher``."""

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
from lightning_rkd.cli.commands import common
from lightning_rkd.cli.trainer import TrainingCLI, check_writable
from lightning_rkd.distillation.teachers import CachedTeacher, Teacher
from lightning_rkd.distillation.teachers.cache_writer import write_cache
from lightning_rkd.utils.distributed import rank_and_size


def main(args: Sequence[str]) -> None:
    """Run the command."""
    own, rest = _parser().parse_known_args(list(args))
    if not own.config:
        raise argparse.ArgumentError(
            None, "cache needs a recipe with teacher and data: lightning-rkd cache --config RECIPE"
        )
    given = [part for name in own.config for part in ("--config", name)]
    with _process_group():
        _cache(own, [*recipes.resolve(given), *rest, "--trainer.logger=false", "--trainer.enable_checkpointing=false"])


def _cache(own: argparse.Namespace, config: list[str]) -> None:
    cli = TrainingCLI(config, run=False)
    parts: list[Any] = [cli.model, *cli.trainer.callbacks]  # type: ignore[attr-defined] # set by a connector
    parts = [part for part in parts if hasattr(part, "distiller") and part.distiller.teacher is not None]
    if len(parts) != 1:
        raise argparse.ArgumentError(None, f"the recipe must have one teacher to cache, and it has {len(parts)}")
    teacher, folder, dtype = parts[0].distiller.teacher, own.out, own.dtype
    if isinstance(teacher, CachedTeacher):
        folder, dtype, teacher = folder or teacher.path, dtype or teacher.dtype, teacher.teacher
    if not isinstance(teacher, Teacher):
        message = "the recipe's teacher must be a network, a Teacher, or a CachedTeacher with one inside"
        raise argparse.ArgumentError(None, f"{message}; got {teacher and type(teacher).__name__}")
    folder = Path(folder or Path(cli.trainer.default_root_dir, "teacher_cache"))
    check_writable(folder)
    data = cli.datamodule if cli.datamodule is not None else cli.model
    data.prepare_data()
    data.setup("fit")
    with _progress() as progress:
        written = write_cache(
            folder,
            teacher,
            parts[0].distiller.teacher_layer,
            data.train_dataloader(),
            unpack=parts[0].unpack,
            dtype=dtype or "float32",
            device=cli.trainer.strategy.root_device,
            batch_size=own.batch_size,
            shard_rows=own.shard_rows,
            overwrite=own.overwrite,
            progress=progress,
        )
    if rank_and_size()[0] == 0:
        print(f"{'written' if written else 'nothing to do, the cache is complete and intact'}: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = common.new_parser(
        "cache",
        "Write the outputs of a recipe's teacher for every row of the data set, to be read by CachedTeacher. An "
        "interrupted run resumes; a complete cache is verified. Under torchrun the processes share the work.",
        "Any other option changes the recipe, as for fit.",
    )
    parser.add_argument("--config", "-c", metavar="RECIPE", action="append", help="recipe with teacher and data")
    parser.add_argument("--out", type=Path, help="folder (default: CachedTeacher's, or teacher_cache in the run's)")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="type of the stored numbers (default: float32)")
    parser.add_argument("--batch_size", type=int, default=128, help="images in one forward pass of the teacher")
    parser.add_argument("--shard_rows", type=int, default=8192, help="rows in a file; a resumed run begins at a file")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in the folder first")
    return parser


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("running the teacher"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=rank_and_size()[0] > 0 or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, rows: bar.update(task, completed=done, total=rows)


@contextmanager
def _process_group() -> Iterator[None]:
    """Join the other processes of ``torchrun``, if it has started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
