"""Recipes and comparisons: configurations in YAML that come with the package and are known by their bare names."""

import difflib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent

Kind = Literal["recipe", "comparison"]


class UnknownRecipeError(ValueError):
    """A name that is neither a file nor a recipe."""


def _folder(kind: Kind) -> Path:
    return FOLDER if kind == "recipe" else FOLDER / "compare"


def names(kind: Kind = "recipe") -> list[str]:
    """Names of all recipes, or of all comparisons, in alphabetical order."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def about(name: str) -> str:
    """First sentence of a recipe's header."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    sentence, stop, _ = header.partition(". ")
    return sentence + stop.strip()


def find(config: str, kind: Kind = "recipe") -> Path:
    """Path of a configuration: an existing file, or the recipe of that name."""
    path, known = Path(config), names(kind)
    if path.is_file():
        return path
    if config in known:
        return _folder(kind) / f"{config}.yaml"
    near = difflib.get_close_matches(config, known, n=len(known), cutoff=0.5)
    ordered = [*near, *(name for name in known if name not in near)]
    raise UnknownRecipeError(f"{config!r} is neither a file nor a {kind}; the {kind}s are {', '.join(ordered)}")


def resolve(args: Sequence[str]) -> list[str]:
    """Replace the names of recipes after ``--config`` and ``-c`` by their paths."""
    resolved: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c") and equals:
            arg = f"{flag}={find(value)}"
        elif resolved and resolved[-1] in ("--config", "-c"):
            arg = str(find(arg))
        resolved.append(arg)
    return resolved
