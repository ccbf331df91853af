"""Docstrings for the site: Sphinx markup converted to Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


def markdown(text: str) -> str:
    """Convert equations and roles to Markdown.

    >>> markdown("The loss :math:`x^2` of :class:`~a.b.C`.")
    'The loss $x^2$ of `C`.'
    """
    text = re.sub(r"^\.\. math::[ ]*(.*(?:\n(?:[ \t]+.*|[ \t]*$))*)", _block, text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # griffe reads these as code
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


def _block(found: re.Match[str]) -> str:
    first, _, rest = found[1].partition("\n")
    lines = [first.strip(), *textwrap.dedent(rest).strip().splitlines()]
    equation = "\n".join(line for line in lines if line.strip())
    return f"\n$$\n{equation}\n$$\n"


class Markdown(griffe.Extension):
    """Converts every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of an object that has one."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
