"""Tuning: values that are chosen on validation data with the first seed; the test data are not read."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_rkd.cli.experiments.plan import Comparison, Network, folder_of
from lightning_rkd.cli.experiments.runs import RESULT, Run
from lightning_rkd.cli.experiments.schedule import Failure
from lightning_rkd.cli.experiments.tasks import Task, tasks_of
from lightning_rkd.utils.files import write_whole

_SHORT = ("weight", "task_weight", "balance", "loss")
"""Arguments of the module that need no ``model.init_args`` before them."""


@dataclass(frozen=True)
class Trial:
    """A network with one choice of values, by path, and its run, which is measured on validation data."""

    network: Network
    values: dict[str, Any]
    task: Task

    @property
    def label(self) -> str:
        """The values in a message."""
        return ", ".join(f"{path}={value}" for path, value in self.values.items())

    def score(self, results: Mapping[str, Run | Failure], select: str) -> float | None:
        """Score on validation data; ``None`` if the run failed or the score is not a number."""
        run = results[self.task.folder]
        if isinstance(run, Failure):
            return None
        if select not in run.scores:
            known = ", ".join(run.scores)
            raise ValueError(f"select: there is no score {select!r} on validation data; there are {known}")
        return run.scores[select] if run.scores[select] == run.scores[select] else None


def _parse(specs: Sequence[str], comparison: Comparison) -> dict[str, dict[str, list[Any]]]:
    """Values by network and path."""
    entries = {n.entry: n.config["model"].get("init_args", {}).get("loss") for n in comparison.networks}
    wanted: dict[str, dict[str, list[Any]]] = {}
    for spec in specs:
        target, equals, text = spec.partition("=")
        values = [yaml.safe_load(part) for part in text.split(",") if part.strip()]
        entry = max((e for e in entries if target.startswith(f"{e}.")), key=len, default=None)
        path = target if entry is None else target.removeprefix(f"{entry}.")
        if not equals or not values or not path:
            raise ValueError(f"--tune: expected NETWORK.weight=0.5,1,2 or weight=0.5,1,2 for all, got {spec!r}")
        if path.split(".")[0] not in (*_SHORT, "model", "data", "trainer"):
            raise ValueError(
                f"--tune: {spec!r} names none of the networks {', '.join(entries)}, followed by weight, task_weight, "
                "balance, loss.init_args.NAME, or a path that begins with model, data or trainer"
            )
        for chosen in [entry] if entry is not None else [e for e, loss in entries.items() if loss is not None]:
            wanted.setdefault(chosen, {})[path] = values
    return wanted


def plan_trials(specs: Sequence[str], comparison: Comparison) -> list[Trial]:
    """All combinations of a network's values of ``--tune``, each with the first seed; of generations, the first."""
    if specs and comparison.select is None:
        raise ValueError("--tune needs a score to maximise on validation data: add select: NAME to the file")
    trials = []
    for entry, paths in _parse(specs, comparison).items():
        for combination in itertools.product(*paths.values()):
            values = dict(zip(paths, combination, strict=True))
            changed = comparison.with_settings(entry, in_config(values))
            network = next(network for network in changed.networks if network.entry == entry)
            trial = Trial(network, values, tasks_of(changed, [network], changed.seeds[:1])[-1])
            name, folder = f"{network.name} ({trial.label})", f"tune/{folder_of(entry)}/{folder_of(trial.label)}"
            trials.append(replace(trial, task=replace(trial.task, network=name, folder=folder, split="validation")))
    return trials


def in_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their paths in the configuration."""
    return {f"model.init_args.{path}" if path.split(".")[0] in _SHORT else path: v for path, v in values.items()}


def reuse(trial: Trial, out: Path, seed: int) -> None:
    """Copy a trial's checkpoint to where the same run of the comparison resumes from it."""
    folder, source = out / f"{trial.network.folder}-{seed}", out / trial.task.folder / "last.ckpt"
    if not (folder / RESULT).exists() and not (folder / "last.ckpt").exists() and source.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "last.ckpt", source.read_bytes())
