"""The recipes: configurations in YAML that come with the package and are known by their bare names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the recipes lie."""


class UnknownRecipeError(ValueError):
    """A configuration that is neither a file nor a recipe."""


def names() -> list[str]:
    """All recipes, in alphabetical order.

    Example:
        >>> "glyphs_rkd" in names()
        True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The first sentence of a recipe's header.

    Example:
        >>> about("glyphs_rkd")
        'A small student of letters, with a triplet loss and relational distillation from the teacher.'
    """
    header = []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# "))
    sentence, stop, _ = " ".join(header).partition(". ")
    return sentence + stop.strip()


def find(config: str) -> Path:
    """The file behind what was given as ``--config``: a path that exists, else the recipe of that name.

    Raises:
        UnknownRecipeError: Neither; the message lists the recipes, near ones first.

    Example:
        >>> find("glyphs_rkd").name
        'glyphs_rkd.yaml'
    """
    path = Path(config)
    if path.is_file():
        return path
    known = names()
    if config in known:
        return FOLDER / f"{config}.yaml"
    near = difflib.get_close_matches(config, known, n=len(known), cutoff=0.5)
    ordered = [*near, *(name for name in known if name not in near)]
    raise UnknownRecipeError(f"{config!r} is neither a file nor a recipe; the recipes are {', '.join(ordered)}")


def resolve(args: Sequence[str]) -> list[str]:
    """Replace names of recipes behind ``--config`` and ``-c`` with their files.

    Raises:
        UnknownRecipeError: Neither a file nor a recipe.

    Example:
        >>> resolve(["fit", "--config", "glyphs_rkd"])[2].endswith("recipes/glyphs_rkd.yaml")
        True
    """
    resolved: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c") and equals:
            arg = f"{flag}={find(value)}"
        elif resolved and resolved[-1] in ("--config", "-c"):
            arg = str(find(arg))
        resolved.append(arg)
    return resolved
