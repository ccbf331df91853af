"""Values that are chosen on validation data, with the first seed; the test data have no part in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_rkd.cli.experiments.plan import Comparison, folder_of
from lightning_rkd.cli.experiments.runs import RESULT, Run
from lightning_rkd.cli.experiments.tasks import Failure, Task, tasks_of
from lightning_rkd.utils.files import write_whole

_SHORT = ("weight", "task_weight", "balance", "loss")
"""Arguments of the module that need no ``model.init_args`` before them."""


@dataclass(frozen=True)
class Trial:
    """One network with one choice of values.

    Attributes:
        entry: The network's name in the file.
        values: By the path that was given.
        settings: By the path in the configuration.
        task: Its run, measured on validation data.
    """

    entry: str
    values: dict[str, Any]
    settings: dict[str, Any]
    task: Task

    @property
    def label(self) -> str:
        """The values for people."""
        return ", ".join(f"{path}={value}" for path, value in self.values.items())


def parse(specs: Sequence[str], comparison: Comparison) -> dict[str, dict[str, list[Any]]]:
    """What ``--tune`` asks for: by network and path, the values.

    Raises:
        ValueError: A specification that does not fit; the message says how one looks.

    Example:
        >>> from lightning_rkd.cli.experiments.plan import Network
        >>> taught = {"model": {"init_args": {"loss": {"class_path": "RKD"}}}}
        >>> comparison = Comparison("", (Network("RKD", taught, "RKD"),), (0,))
        >>> parse(["RKD.weight=0.5,1", "loss.init_args.angle_weight=2"], comparison)
        {'RKD': {'weight': [0.5, 1], 'loss.init_args.angle_weight': [2]}}
    """
    entries = list(dict.fromkeys(n.entry for n in comparison.networks))
    wanted: dict[str, dict[str, list[Any]]] = {}
    for spec in specs:
        target, equals, text = spec.partition("=")
        values = [yaml.safe_load(part) for part in text.split(",") if part.strip()]
        named = [e for e in entries if target.startswith(f"{e}.")]
        entry = max(named, key=len) if named else None
        path = target[len(entry) + 1 :] if entry is not None else target
        if not equals or not values or not path:
            raise ValueError(f"--tune: expected NETWORK.weight=0.5,1,2 or weight=0.5,1,2 for all, got {spec!r}")
        if path.split(".")[0] not in (*_SHORT, "model", "data", "trainer"):
            raise ValueError(
                f"--tune: {spec!r} names none of the networks {', '.join(entries)}, followed by weight, task_weight, "
                "balance, loss.init_args.NAME, or a path that begins with model, data or trainer"
            )
        for chosen in [entry] if entry is not None else [e for e in entries if _has_loss(comparison, e)]:
            wanted.setdefault(chosen, {})[path] = values
    return wanted


def trials(wanted: Mapping[str, Mapping[str, Sequence[Any]]], comparison: Comparison) -> list[Trial]:
    """All combinations of a network's values, each with the first seed; of generations, the first."""
    found = []
    for entry, paths in wanted.items():
        for values in itertools.product(*paths.values()):
            chosen = dict(zip(paths, values, strict=True))
            settings = {_in_config(path): value for path, value in chosen.items()}
            changed = comparison.changed(entry, settings)
            task = next(t for t in tasks_of(changed, changed.of(entry)[:1], changed.seeds[:1]) if not t.fills)
            label = folder_of(" ".join(f"{path} {value}" for path, value in chosen.items()))
            tuned = Task(
                f"{task.network} ({', '.join(f'{p}={v}' for p, v in chosen.items())})",
                task.seed,
                task.config,
                f"tune/{folder_of(entry)}/{label}",
                task.teacher,
                task.cache,
                split="validation",
            )
            found.append(Trial(entry, chosen, settings, tuned))
    return found


def best(done: Sequence[Trial], results: Mapping[str, Run | Failure], select: str) -> dict[str, Trial]:
    """By network, the trial with the highest score; networks all of whose trials failed are left out.

    Raises:
        ValueError: There is no such score.
    """
    chosen: dict[str, Trial] = {}
    for trial in done:
        if (score := score_of(trial, results, select)) is None:
            continue
        before = chosen.get(trial.entry)
        if before is None or score > (score_of(before, results, select) or float("-inf")):
            chosen[trial.entry] = trial
    return chosen


def score_of(trial: Trial, results: Mapping[str, Run | Failure], select: str) -> float | None:
    """What a trial has reached on validation data; ``None`` if it failed or reached nothing that is a number.

    Raises:
        ValueError: There is no such score.
    """
    run = results[trial.task.folder]
    if isinstance(run, Failure):
        return None
    if select not in run.scores:
        raise ValueError(f"select: there is no score {select!r} on validation data; there are {', '.join(run.scores)}")
    score = run.scores[select]
    return score if score == score else None


def take_over(trial: Trial, out: Path, comparison: Comparison) -> None:
    """Let the comparison's run of the same network and seed begin with what the trial has trained."""
    network = comparison.of(trial.entry)[0]
    folder = out / f"{folder_of(network.name)}-{comparison.seeds[0]}"
    source = out / trial.task.folder / "last.ckpt"
    if not (folder / RESULT).exists() and not (folder / "last.ckpt").exists() and source.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "last.ckpt", source.read_bytes())


def _has_loss(comparison: Comparison, entry: str) -> bool:
    return comparison.of(entry)[0].config["model"].get("init_args", {}).get("loss") is not None


def _in_config(path: str) -> str:
    short = path.split(".")[0] in _SHORT
    return f"model.init_args.{path}" if short else path
