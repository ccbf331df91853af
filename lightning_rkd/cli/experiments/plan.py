"""What is compared: a YAML file becomes networks, each a configuration of ``fit``."""

from __future__ import annotations

import argparse
import copy
import difflib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_rkd import losses
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments.runs import prepare
from lightning_rkd.cli.experiments.settings import Config, with_settings, with_steps
from lightning_rkd.utils.messages import brief

TEACHER = "teacher"
"""Name of the teacher's row."""

_KEYS = (
    "title", "recipe", "config", "set", "steps", "seeds", "teacher", "cache", "agreement", "baseline", "networks",
    "scores", "select",
)  # fmt: skip
_NETWORK = ("recipe", "config", "loss", "weight", "task_weight", "balance", "cache", "set", "generations")
_TEACHER = ("recipe", "config", "set", "steps", "seed")
_MODEL = "model.init_args"
TAUGHT = f"{_MODEL}.teacher"
"""Where a configuration has its teacher."""


@dataclass(frozen=True)
class Network:
    """A row of the table.

    Attributes:
        name: Of the row.
        config: What trains it. Files that another run leaves are not named yet.
        entry: Its entry in the file; generations share one.
        taught_by: Name of the network of this comparison that teaches it.
        cached: Whether its teacher's answers come from the shared cache.
    """

    name: str
    config: Config = field(repr=False)
    entry: str
    taught_by: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Comparison:
    """All that is compared.

    Attributes:
        title: Above the table.
        networks: In the order of the table, the teacher apart.
        seeds: Of every network but the teacher.
        teacher: Trained first, once.
        teacher_seed: Its seed.
        baseline: Name of the network that the others are compared with.
        scores: Columns; ``None`` takes all that the networks' metrics give.
        select: Score that is highest for the best tuned value.
    """

    title: str
    networks: tuple[Network, ...]
    seeds: tuple[int, ...]
    teacher: Network | None = None
    teacher_seed: int = 0
    baseline: str | None = None
    scores: tuple[str, ...] | None = None
    select: str | None = None

    def of(self, entry: str) -> list[Network]:
        """The networks of an entry, generation by generation."""
        return [network for network in self.networks if network.entry == entry]

    def changed(self, entry: str, settings: Mapping[str, Any]) -> Comparison:
        """A copy in which the networks of one entry have other settings."""
        networks = tuple(
            replace(n, config=with_settings(n.config, settings)) if n.entry == entry else n for n in self.networks
        )
        return replace(self, networks=networks)


def find(name: str) -> Path:
    """The file of a comparison: a path that exists, else the one of that name that comes with the package.

    Raises:
        UnknownRecipeError: Neither.

    Example:
        >>> find("glyphs_losses").name
        'glyphs_losses.yaml'
    """
    if Path(name).is_file():
        return Path(name)
    known = names()
    if name in known:
        return recipes.FOLDER / "compare" / f"{name}.yaml"
    raise recipes.UnknownRecipeError(
        f"{name!r} is neither a file nor a comparison{_near(name, known)}; the comparisons are {', '.join(known)}"
    )


def names() -> list[str]:
    """The comparisons that come with the package.

    Example:
        >>> "glyphs_losses" in names()
        True
    """
    return sorted(path.stem for path in (recipes.FOLDER / "compare").glob("*.yaml"))


def read(
    path: Path,
    *,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Read a comparison.

    Args:
        path: Its file.
        seeds: Instead of those of the file.
        steps: Of every network, the teacher included, instead of those of the file.
        settings: By dotted path, the last word for all networks; of the teacher all but its ``model``.

    Raises:
        ValueError: The file does not say what is to be compared; the message says where.
    """
    try:
        return _Reader(path, steps, dict(settings or {})).comparison(seeds)
    except ValueError as error:
        if isinstance(error, recipes.UnknownRecipeError) or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from error


def check(networks: Iterable[Network]) -> None:
    """Build what every configuration describes, so that what does not fit is known before anything is trained.

    Raises:
        ValueError: One does not fit; the message names it.
    """
    for network in networks:
        model = network.config["model"].get("init_args", {})
        for name in _losses(model.get("loss")):
            if "." not in name and name not in losses.__all__:
                raise ValueError(f"{network.name}: there is no loss {name!r}{_near(name, losses.__all__)}")
        if model.get("loss") is not None and model.get("teacher") is None:
            raise ValueError(
                f"{network.name}: its loss needs a teacher, and neither the recipe nor the comparison has one: add "
                "teacher:, or take the loss away with loss: null"
            )
        config = network.config
        if network.cached:
            config = with_settings(config, {f"{TAUGHT}.init_args.path": "cache"})
        with tempfile.TemporaryDirectory() as folder:
            try:
                prepare(config, Path(folder), 0)
            except (Exception, SystemExit) as error:
                message = str(error)
                if isinstance(error, argparse.ArgumentError):
                    message = " ".join(brief(message).split())
                raise ValueError(f"{network.name}: {message}") from error


class _Reader:
    """One file, while it is read."""

    def __init__(self, path: Path, steps: int | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.steps = steps
        self.text = _mapping(_load(path), "the file")
        _only(self.text, _KEYS, "the file")

    def comparison(self, seeds: Sequence[int] | None) -> Comparison:
        text = self.text
        entries = _mapping(text.get("networks"), "networks")
        if not entries:
            raise ValueError("networks: there are none; give each a name, and what differs from the recipe")
        teacher = self.teacher()
        networks: list[Network] = []
        for name, entry in entries.items():
            networks += self.networks(str(name), _mapping(entry or {}, str(name)), teacher)
        _different_folders([n.name for n in networks])
        known = [n.name for n in networks]
        baseline = text.get("baseline")
        if baseline is not None and baseline not in known:
            raise ValueError(f"baseline: there is no network {baseline!r}{_near(str(baseline), known)}")
        scores = text.get("scores")
        if scores is not None and (not isinstance(scores, list) or not all(isinstance(s, str) for s in scores)):
            raise ValueError(f"scores: expected a list of names, got {scores!r}")
        return Comparison(
            str(text.get("title", self.path.stem)),
            tuple(networks),
            _seeds(seeds if seeds is not None else text.get("seeds", [0, 1, 2])),
            teacher,
            int(_mapping(text.get("teacher") or {}, "teacher").get("seed", 0)),
            baseline,
            None if scores is None else tuple(scores),
            text.get("select"),
        )

    def teacher(self) -> Network | None:
        if self.text.get("teacher") is None:
            if self.text.get("cache"):
                raise ValueError("cache: there is no teacher: to ask; name the recipe that trains it")
            return None
        entry = _mapping(self.text["teacher"], "teacher")
        _only(entry, _TEACHER, "teacher")
        if "recipe" not in entry and "config" not in entry:
            raise ValueError("teacher: name the recipe that trains it, recipe: NAME_OR_FILE")
        config = self.config(entry, "teacher", entry.get("steps"))
        own = {path: value for path, value in self.settings.items() if not path.startswith("model.")}
        return Network(TEACHER, with_settings(config, own), TEACHER)

    def config(self, entry: Mapping[str, Any], name: str, steps: int | None = None) -> Config:
        """The recipe of an entry, or of the file, with the settings of the file and of the entry."""
        source = entry if "recipe" in entry or "config" in entry else self.text
        if "recipe" in source and "config" in source:
            raise ValueError(f"{name}: recipe: and config: are two ways to say the same; keep one")
        if "config" in source:
            config = copy.deepcopy(_mapping(source["config"], "config"))
        elif "recipe" in source:
            near = self.path.parent / str(source["recipe"])
            config = _load(near if near.is_file() else recipes.find(str(source["recipe"])))
        else:
            raise ValueError("recipe: name a configuration of fit, a recipe or a file")
        config = with_settings(_mapping(config, "the recipe"), _mapping(self.text.get("set") or {}, "set"))
        steps = self.steps or steps or self.text.get("steps")
        if steps is not None:
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"steps: expected a number of at least 1, got {steps!r}")
            config = with_steps(config, steps)
        config = with_settings(config, _mapping(entry.get("set") or {}, f"{name}: set"))
        return config

    def networks(self, name: str, entry: Mapping[str, Any], teacher: Network | None) -> list[Network]:
        """The rows of an entry."""
        if name == TEACHER:
            raise ValueError(f"networks: {TEACHER!r} is the name of the teacher's own row; choose another")
        _only(entry, _NETWORK, f"networks: {name}")
        generations = entry.get("generations", 1)
        if not isinstance(generations, int) or generations < 1:
            raise ValueError(f"{name}: generations must be a number of at least 1, got {generations!r}")
        config = self.config(entry, name)
        model = config["model"].setdefault("init_args", {})
        for key in ("weight", "task_weight", "balance"):
            if key in entry:
                model[key] = entry[key]
        if "loss" in entry:
            model["loss"] = _as_classes(entry["loss"])
        if entry.get("cache") and teacher is None:
            raise ValueError(f"{name}: cache: there is no teacher: to ask; name the recipe that trains it")
        if self.text.get("agreement"):
            model.setdefault("metrics", {})["agreement"] = "RelationalAgreement"
        lone = model.get("loss") is None
        if lone and not self.text.get("agreement"):
            for key in ("loss", "teacher", "teacher_layer", "weight", "balance"):
                model.pop(key, None)
        found: list[Network] = []
        for generation in range(1, generations + 1):
            row = f"{name} {generation}" if generations > 1 else name
            own = copy.deepcopy(config)
            taught_by: str | None = None
            cached = False
            if generation > 1:
                taught_by = found[-1].name
                own["model"]["init_args"]["teacher"] = _teacher_of(config)
            elif teacher is not None and (not lone or self.text.get("agreement")):
                taught_by, cached = TEACHER, bool(entry.get("cache", self.text.get("cache")))
                own["model"]["init_args"]["teacher"] = (
                    {"class_path": "CachedTeacher", "init_args": {}} if cached else _teacher_of(teacher.config)
                )
            found.append(Network(row, with_settings(own, self.settings), name, taught_by, cached))
        if generations > 1 and lone:
            raise ValueError(f"{name}: generations teach one another, which needs a loss")
        return found


def _teacher_of(config: Config) -> Config:
    """A teacher that is what a configuration trains, and has its weights from a file."""
    network = copy.deepcopy(config["model"]["init_args"]["student"])
    return {"class_path": "Teacher", "init_args": {"network": network, "weights": None}}


def folder_of(name: str) -> str:
    """A name as it can stand in a path.

    Example:
        >>> folder_of("RKD-DA, twice (λ = 2)")
        'rkd-da-twice-λ-2'
    """
    kept = "".join(c if c.isalnum() or c in "-_." else " " for c in name.lower())
    return "-".join(kept.split()).strip(".-") or "network"


def _different_folders(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(folder_of(name), name)) is not name:
            raise ValueError(f"networks: the names {other!r} and {name!r} would share a folder; rename one")


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return tuple(range(seeds))
    whole = isinstance(seeds, list | tuple) and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected a number of seeds (3) or different seeds ([0, 1, 2]), got {seeds!r}")
    return tuple(seeds)


def _as_classes(loss: Any) -> Any:
    """``RKD`` becomes ``{class_path: RKD}``, also within a dict of several losses."""
    if isinstance(loss, str):
        return {"class_path": loss}
    if isinstance(loss, dict) and "class_path" not in loss:
        return {name: _as_classes(part) for name, part in loss.items()}
    return loss


def _losses(loss: Any) -> list[str]:
    """The class paths in it."""
    if isinstance(loss, str):
        return [loss]
    if not isinstance(loss, dict):
        return []
    return [loss["class_path"]] if "class_path" in loss else [name for part in loss.values() for name in _losses(part)]


def _only(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where}: there is no key {key!r}{_near(str(key), known)}; the keys are {', '.join(known)}"
            )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected names and values, got {value!r}")
    return value


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


class _Once(yaml.SafeLoader):
    """Refuses a mapping that has a key twice; YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n] and key != "<<"]:
            raise ValueError(f"{twice[0]!r} is named twice (line {node.start_mark.line + 1} and after)")
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Once)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
