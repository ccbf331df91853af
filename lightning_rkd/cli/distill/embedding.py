"""Embeddings of all samples by the teacher, computed once and written in shards, so that a stopped run goes on."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lightning_rkd.cli.distill.decisions import decide
from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.cli.distill.teachers import NetworkTeacher, TeacherSource
from lightning_rkd.distillation.teachers.cache_format import DamagedError, read_shard, write_shard

SHARD_ROWS = 512
"""Samples in a shard: at most these are embedded again after a stop."""

BATCH = 64
_FIELD = "/embedding"


@contextmanager
def show_progress(console: Console, what: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Progress bar with an estimate of the time that is left; the function takes what is done, and a remark."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left {task.fields[remark]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, remark="")

        def show(done: int, remark: str) -> None:
            progress.update(task, completed=done, remark=remark)

        yield show


def embed_all(
    source: TeacherSource, samples: Samples, test: Samples | None, folder: Path, precision: str, console: Console
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of the data and of the test data, if there are any.

    Raises:
        ValueError: Embeddings of another number than the samples, or that hold NaN or infinity.
    """
    if source.rows is not None:
        return divide_rows(source, samples, test)
    assert source.embed is not None
    if isinstance(source.embed, NetworkTeacher):
        fetch = partial(samples.fetch, range(min(16, len(samples))))
        teacher = source.embed
        if precision == "bf16" or (
            precision == "auto" and decide(folder, "teacher_bf16", lambda: _gains_by_bf16(teacher, fetch()))
        ):
            teacher.bf16 = True
            why = "as asked" if precision == "bf16" else "which is faster here; --precision 32 avoids it"
            console.print(f"The teacher runs in bf16 ({why}).")
    about = {"teacher": f"{source.name} {source.key}"}
    found = embed_samples(source.embed, samples, folder / "teacher", about, console)
    return found, None if test is None else embed_samples(source.embed, test, folder / "teacher_test", about, console)


def divide_rows(source: TeacherSource, samples: Samples, test: Samples | None) -> tuple[Tensor, Tensor | None]:
    """Embeddings that are there already, of the data and of the test data that follow."""
    x, name = source.rows, source.name
    assert x is not None
    if len(x) != len(samples) + (0 if test is None else len(test)):
        behind = "" if test is None else f" and {len(test):,} test samples, whose embeddings follow"
        raise ValueError(
            f"the teacher {name} has {len(x):,} embeddings for {len(samples):,} samples{behind}: expected a row for "
            "each"
        )
    given = [_identify(samples), *([] if test is None else [_identify(test)])]
    if source.made_for and list(source.made_for) != given:
        raise ValueError(f"the teacher {name} has embeddings of other samples: give the data of that run, unchanged")
    rest = None if test is None else check_rows(x[len(samples) :], test)
    return check_rows(x[: len(samples)], samples), rest


def _gains_by_bf16(teacher: NetworkTeacher, items: Any) -> bool:
    """True if the network embeds samples at least a quarter faster in bf16."""
    seconds = []
    for bf16 in (False, True):
        one = NetworkTeacher(teacher.network, teacher.prepare, teacher.read, teacher.device, bf16)
        one(items)
        before = time.perf_counter()
        one(items)
        seconds.append(time.perf_counter() - before)
    return seconds[1] < 0.75 * seconds[0]


def embed_samples(
    embed: Callable[[Any], Tensor], samples: Samples, folder: Path, about: Mapping[str, Any], console: Console
) -> Tensor:
    """Embeddings (N, D) of all samples, from the shards in a folder, which are written where they are missing.

    Args:
        embed: Function from a list of samples to embeddings (M, D).
        samples: The samples.
        folder: Folder of the shards.
        about: What identifies the teacher.
        console: Where progress is printed.

    Raises:
        ValueError: An embedding holds NaN or infinity; the message names the sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"rows": len(samples), "shard_rows": SHARD_ROWS, "data": _identify(samples), **about}
    parts = []
    with show_progress(console, "Embedding with the teacher", len(samples), samples.kind + "s") as show:
        for number, start in enumerate(range(0, len(samples), SHARD_ROWS)):
            stop = min(start + SHARD_ROWS, len(samples))
            try:
                found = read_shard(folder, plan, number)[_FIELD].clone()
            except DamagedError:
                batches = []
                for first in range(start, stop, BATCH):
                    rows = range(first, min(first + BATCH, stop))
                    batches.append(check_rows(embed(samples.fetch(rows)), samples, first))
                    show(rows.stop, "")
                found = torch.cat(batches)
                write_shard(folder, plan, number, {_FIELD: found})
            show(stop, "")
            parts.append(found)
    return torch.cat(parts)


def _identify(samples: Samples) -> str:
    """Checksum of samples, whatever their labels."""
    return replace(samples, labels=None).fingerprint


def check_rows(x: Tensor, samples: Samples, first: int = 0) -> Tensor:
    """Return the embeddings, unless one holds NaN or infinity."""
    if len(bad := (~x.isfinite()).any(1).nonzero()):
        name = samples.name(first + int(bad[0]))
        raise ValueError(f"the teacher's embedding of {name} is NaN or infinite: mend or take out that sample")
    return x
