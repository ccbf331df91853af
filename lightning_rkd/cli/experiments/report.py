"""Report page: one HTML file without references to other files or the network, light and dark."""

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
    """A figure of the report, drawn for light and for dark paper."""

    heading: str
    caption: str
    light: Figure
    dark: Figure


def render(
    title: str,
    lead: str,
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    commands: Mapping[str, str],
    footer: str,
) -> str:
    """The page as HTML.

    Args:
        title: Title of the page.
        lead: Paragraph below the title.
        table: Rows of cells; the first holds the headings.
        notes: Paragraphs below the table.
        pictures: Figures in their order.
        commands: Commands by their purpose.
        footer: Last line.

    Example:
        >>> page = render("A < B", "Lead.", [["network"], ["RKD & more"]], [], [], {"Again:": "make demo"}, "today")
        >>> "A &lt; B" in page, "<td>RKD &amp; more</td>" in page, "http" in page
        (True, True, False)
    """
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table)
    rows = "\n".join(f"<tr>{row}</tr>" for row in body)
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=_paragraphs([lead]),
        table=f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead>\n<tbody>{rows}\n</tbody></table>",
        below=_paragraphs(notes),
        pictures="\n".join(map(_section, pictures)),
        commands="\n".join(f"<p>{escape(why)}</p>\n<pre>{escape(command)}</pre>" for why, command in commands.items()),
        made=escape(footer),
    )


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _section(picture: Picture) -> str:
    light, dark = (base64.b64encode(to_png(figure)).decode() for figure in (picture.light, picture.dark))
    width, height = (round(picture.light.dpi * inches) for inches in picture.light.get_size_inches())
    kind, alt = "data:image/png;base64,", escape(picture.heading)
    return f"""<h2>{escape(picture.heading)}</h2>
<p>{escape(picture.caption)}</p>
<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{kind}{dark}">
<img src="{kind}{light}" alt="{alt}" width="{width}" height="{height}"></picture></figure>"""


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)
