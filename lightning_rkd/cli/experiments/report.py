"""A report that is one HTML file: no other file, no network, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture for both kinds of paper.

    Attributes:
        heading: Above it.
        caption: What is to be seen.
        light: For light paper.
        dark: For dark paper.
    """

    heading: str
    caption: str
    light: Figure
    dark: Figure


def report(
    title: str,
    lead: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    below: Sequence[str],
    pictures: Sequence[Picture],
    commands: Mapping[str, str],
    made: str,
) -> str:
    """The page.

    Args:
        title: Of the page.
        lead: Paragraphs below it.
        head: Of the table.
        rows: Of the table.
        below: Paragraphs below the table.
        pictures: In their order.
        commands: What one might do next, by what it is for.
        made: The last line: when, with what, on what.

    Example:
        >>> page = report("A < B", ["Seen."], ["network"], [["RKD & more"]], [], [], {"Again:": "make demo"}, "today")
        >>> "A &lt; B" in page, "<td>RKD &amp; more</td>" in page, "http" in page
        (True, True, False)
    """
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return Template(text).substitute(
        title=escape(title),
        lead=_paragraphs(lead),
        table=f"<table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table>",
        below=_paragraphs(below),
        pictures="\n".join(map(_section, pictures)),
        commands="\n".join(
            f"<p>{escape(what)}</p>\n<pre>{escape(command)}</pre>" for what, command in commands.items()
        ),
        made=escape(made),
    )


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _section(picture: Picture) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png(f)).decode()}" for f in (picture.light, picture.dark))
    width, height = (round(picture.light.dpi * side) for side in picture.light.get_size_inches())
    return f"""<h2>{escape(picture.heading)}</h2>
<p>{escape(picture.caption)}</p>
<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="{escape(picture.heading)}" width="{width}" height="{height}"></picture></figure>"""


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)
