"""Comparisons: a YAML file becomes networks, each a configuration of ``lightning-rkd fit``."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_rkd import experimental, losses
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import prepare
from lightning_rkd.cli.experiments.settings import Config, with_settings, with_steps

TEACHER = "teacher"
"""Name and folder of the teacher's row."""

TEACHER_PATH = "model.init_args.teacher"
"""Dotted path of the teacher in a configuration."""

_KEYS = (
    "title", "recipe", "set", "steps", "seeds", "teacher", "cache", "agreement", "baseline", "networks", "scores",
    "select",
)  # fmt: skip
_NETWORK_KEYS = ("recipe", "loss", "weight", "task_weight", "balance", "cache", "set", "generations")
_TEACHER_KEYS = ("recipe", "set", "steps", "seed")


@dataclass(frozen=True)
class Network:
    """A row of the table: ``config`` lacks the paths of files that other runs write, ``folder`` the seed.

    It is taught by the row ``teacher``, or from that one's cache; the generations of an ``entry`` are several rows.
    """

    name: str
    config: Config = field(repr=False)
    folder: str
    entry: str
    teacher: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Comparison:
    """Networks that are compared, and the teacher, which is trained once.

    ``select`` is the score that tuning maximises; ``scores`` are the columns of the table, by default all.
    """

    title: str
    networks: tuple[Network, ...]
    seeds: tuple[int, ...]
    teacher: Network | None = None
    teacher_seed: int = 0
    baseline: str | None = None
    scores: tuple[str, ...] | None = None
    select: str | None = None

    def with_settings(self, entry: str, settings: Mapping[str, Any]) -> Comparison:
        """Copy in which the networks of one entry have other settings."""
        new = [replace(n, config=with_settings(n.config, settings)) if n.entry == entry else n for n in self.networks]
        return replace(self, networks=tuple(new))


def folder_of(name: str) -> str:
    """A name in the form in which it can stand in a path."""
    kept = "".join(c if c.isalnum() or c in "-_." else " " for c in name.lower())
    return "-".join(kept.split()).strip(".-") or "network"


def read(
    path: Path,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Comparison:
    """Read a file, with other steps of all networks, with settings of all, and with changes of the file by dotted path.

    The teacher takes the settings except those of ``model``.
    """
    try:
        return _Reader(path, steps, settings or {}, changes or {}).read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check(networks: Iterable[Network]) -> None:
    """Build every network, so that an invalid configuration is an error before anything is trained."""
    for network in networks:
        model, config = network.config["model"].get("init_args", {}), network.config
        if model.get("loss") is not None and model.get("teacher") is None:
            raise ValueError(
                f"{network.name}: its loss needs a teacher, and neither the recipe nor the comparison has one: add "
                "teacher:, or remove the loss with loss: null"
            )
        if network.cached:
            config = with_settings(config, {f"{TEACHER_PATH}.path": "cache"})
        with tempfile.TemporaryDirectory() as folder:
            try:
                prepare(config, Path(folder), 0)
            except (Exception, SystemExit) as error:
                raise ValueError(f"{network.name}: {' '.join(str(error).split())}") from error


class _Reader:
    """One file, while it is read."""

    def __init__(self, path: Path, steps: int | None, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        self.path, self.steps, self.settings = path, steps, settings
        self.text = with_settings(_mapping(_load(path), "the file", _KEYS), changes)
        self.agreement = bool(self.text.get("agreement"))

    def read(self) -> Comparison:
        text = self.text
        entries = _mapping(text.get("networks"), "networks")
        if not entries:
            raise ValueError("networks: there are none; give each a name, and what differs from the recipe")
        teacher = self.read_teacher()
        networks = [n for name, entry in entries.items() for n in self.read_entry(str(name), entry or {}, teacher)]
        folders: dict[str, str] = {}
        for network in networks:
            if (other := folders.setdefault(network.folder, network.name)) != network.name:
                raise ValueError(f"networks: the names {other!r} and {network.name!r} would share a folder; rename one")
        baseline, known = text.get("baseline"), [network.name for network in networks]
        if baseline is not None and baseline not in known:
            raise ValueError(f"baseline: there is no network {baseline!r}{_suggestion(str(baseline), known)}")
        scores = text.get("scores")
        if scores is not None and (not isinstance(scores, list) or not all(isinstance(s, str) for s in scores)):
            raise ValueError(f"scores: expected a list of names, got {scores!r}")
        return Comparison(
            str(text.get("title", self.path.stem)),
            tuple(networks),
            _seeds(text.get("seeds", 3)),
            teacher,
            int((text.get("teacher") or {}).get("seed", 0)),
            baseline,
            None if scores is None else tuple(scores),
            text.get("select") or next(iter(scores or ()), None),
        )

    def read_teacher(self) -> Network | None:
        entries = [self.text, *(entry for entry in self.text["networks"].values() if isinstance(entry, dict))]
        if self.text.get("teacher") is None:
            if any(entry.get("cache") for entry in entries):
                raise ValueError("cache: there is no teacher: to cache; name the recipe that trains it")
            return None
        entry = _mapping(self.text["teacher"], "teacher", _TEACHER_KEYS)
        if "recipe" not in entry:
            raise ValueError("teacher: name the recipe that trains it, recipe: NAME_OR_FILE")
        own = {path: value for path, value in self.settings.items() if not path.startswith("model.")}
        config = with_settings(self.read_config(entry, "teacher", entry.get("steps")), own)
        return Network(TEACHER, config, TEACHER, TEACHER)

    def read_config(self, entry: Mapping[str, Any], name: str, steps: int | None = None) -> Config:
        """The recipe of an entry, or of the file, with the settings of the file and of the entry."""
        recipe = str(entry.get("recipe", self.text.get("recipe", "")))
        if not recipe:
            raise ValueError("recipe: name a configuration of fit, a recipe or a file")
        near = self.path.parent / recipe
        config = _mapping(_load(near if near.is_file() else recipes.find(recipe)), "the recipe")
        config = with_settings(config, _mapping(self.text.get("set") or {}, "set"))
        steps = self.steps or steps or self.text.get("steps")
        if steps is not None:
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"steps: expected a number of at least 1, got {steps!r}")
            config = with_steps(config, steps)
        return with_settings(config, _mapping(entry.get("set") or {}, f"{name}: set"))

    def read_entry(self, name: str, entry: Any, teacher: Network | None) -> list[Network]:
        """The network of an entry, or its generations."""
        if name == TEACHER:
            raise ValueError(f"networks: {TEACHER!r} is the name of the teacher's own row; choose another")
        entry = _mapping(entry, f"networks: {name}", _NETWORK_KEYS)
        generations = entry.get("generations", 1)
        if not isinstance(generations, int) or generations < 1:
            raise ValueError(f"{name}: generations must be a number of at least 1, got {generations!r}")
        config = self.read_config(entry, name)
        model = config["model"].setdefault("init_args", {})
        model |= {key: entry[key] for key in ("weight", "task_weight", "balance") if key in entry}
        if "loss" in entry:
            model["loss"] = _as_classes(entry["loss"], name)
        if self.agreement:
            model.setdefault("metrics", {}).setdefault("agreement", "RelationalAgreement")
        alone = model.get("loss") is None
        if alone and generations > 1:
            raise ValueError(f"{name}: generations teach one another, which needs a loss")
        taught_by, cached = None, False
        if alone and not self.agreement:
            for key in ("loss", "teacher", "teacher_layer", "weight", "balance"):
                model.pop(key, None)
        elif teacher is not None:
            taught_by, cached = TEACHER, bool(entry.get("cache", self.text.get("cache")))
            model["teacher"] = {"class_path": "CachedTeacher"} if cached else as_teacher(teacher.config)
        rows = [name] if generations == 1 else [f"{name} {number + 1}" for number in range(generations)]
        networks = [Network(rows[0], config, folder_of(rows[0]), name, taught_by, cached)]
        if generations > 1:
            later = with_settings(config, {TEACHER_PATH: as_teacher(config)})
            networks += [Network(row, later, folder_of(row), name, before) for before, row in pairwise(rows)]
        return [replace(network, config=with_settings(network.config, self.settings)) for network in networks]


def as_teacher(config: Config) -> Config:
    """Teacher with the network that a configuration trains, whose weights come from a file."""
    return {"class_path": "Teacher", "init_args": {"network": config["model"]["init_args"]["student"], "weights": None}}


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return tuple(range(seeds))
    whole = isinstance(seeds, list | tuple) and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected a number of seeds (3) or different seeds ([0, 1, 2]), got {seeds!r}")
    return tuple(seeds)


def _as_classes(loss: Any, network: str) -> Any:
    """``RKD`` becomes ``{class_path: RKD}``, also within a dict of several losses."""
    if isinstance(loss, dict) and "class_path" not in loss:
        return {name: _as_classes(part, network) for name, part in loss.items()}
    name = loss["class_path"] if isinstance(loss, dict) else loss
    known = [
        *losses.__all__,
        *experimental.__all__,
        *(entry.name for entry in entry_points(group="lightning_rkd.losses")),
    ]
    if isinstance(name, str) and "." not in name and name not in known:
        raise ValueError(f"{network}: there is no loss {name!r}{_suggestion(name, known)}")
    return {"class_path": loss} if isinstance(loss, str) else loss


def _mapping(value: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected names and values, got {value!r}")
    if unknown := [key for key in value if known and key not in known]:
        near = _suggestion(str(unknown[0]), known)
        raise ValueError(f"{where}: there is no key {unknown[0]!r}{near}; the keys are {', '.join(known)}")
    return value


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping in which a key occurs twice; YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n] and key != "<<"]:
            raise ValueError(f"{twice[0]!r} is named twice (line {node.start_mark.line + 1} and after)")
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
