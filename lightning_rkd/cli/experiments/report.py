"""Report pages: one HTML file without references to other files or the network, light and dark."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from lightning_rkd.plots.style import to_png


def render(
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    light: Mapping[str, Figure],
    dark: Mapping[str, Figure],
    template: str | None = None,
    title: str = "What the student learned from its teacher",
    **texts: str,
) -> str:
    """The page: a template with a table, notes below it, figures for light and dark paper, and plain texts.

    The first row of the table holds the headings; figures and texts are given by their places in the template, which is
    the demo's by default.
    """
    frame, report = (Path(__file__).with_name(n).read_text(encoding="utf-8") for n in ("page.html", "report.html"))
    head, *others = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table)
    rows = "\n".join(f"<tr>{row}</tr>" for row in others)
    body = Template(template or report).substitute(
        {name: escape(text) for name, text in texts.items()},
        table=f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead>\n<tbody>{rows}\n</tbody></table>",
        notes="\n".join(f"<p>{escape(text)}</p>" for text in notes),
        **{name: _embed(figure, dark[name], name) for name, figure in light.items()},
    )
    return Template(frame).substitute(title=escape(title), body=body)


def _embed(light: Figure, dark: Figure, name: str) -> str:
    width, height = (round(light.dpi * inches) for inches in light.get_size_inches())
    sources = (f"data:image/png;base64,{base64.b64encode(to_png(figure)).decode()}" for figure in (light, dark))
    return """<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{1}">
<img src="{0}" alt="{2}" width="{3}" height="{4}"></picture></figure>""".format(*sources, name, width, height)
