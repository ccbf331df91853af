"""Table and report page of a distillation."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from lightning_rkd import __version__, plots
from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.cli.distill.scores import HELD_OUT
from lightning_rkd.cli.experiments.report import render
from lightning_rkd.utils import provenance
from lightning_rkd.utils.files import write_whole

CAPTION = (
    "{count:,} held-out samples, by cosine. recall@1: share of samples whose nearest sample, in the network's own "
    "gallery or in the teacher's, is of the same class. Common neighbours: share of a sample's 10 nearest that teacher "
    "and student have in common, {chance:.3f} by chance. Rank correlation: of the distances. ms: "
    "milliseconds for one sample on this machine, with preprocessing."
)
_TITLE = "What the student kept of its teacher"
_ROWS, _SIZE = 400, 48
_SECTIONS = {
    "neighbours": "The nearest images",
    "relations": "Distances between the same samples",
    "angles": "Angles between triplets of samples",
    "map": "Maps",
}
_TEMPLATE = """<h1>$heading</h1>
<p>$about</p>
<div class="wide">$table</div>
$notes
{sections}
<h2>How to use the student</h2>
<pre>$usage</pre>
{again}
<p class="faint">$made</p>
"""


def format_table(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table, with headings."""
    columns = list(dict.fromkeys(name for row in reversed(table) for name in row))
    return [columns, *([_format(name, row.get(name)) for name in columns] for row in table)]


def _format(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if name == "ms" else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def to_markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---|" + "---:|" * (len(cells[0]) - 1), *rows])


def describe_usage(folder: Path, kind: str) -> str:
    """Three lines on how to use the exported student."""
    items = {"image": '["one.jpg"]', "text": '["a text"]', "vector": "rows_like_the_data"}[kind]
    lines = ["from lightning_rkd import export", f"student = export.load({str(folder / 'student')!r})"]
    return "\n".join([*lines, f"embeddings = student({items})  # compare rows by cosine"])


def write_report(
    folder: Path,
    table: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    samples: Samples,
    *,
    about: str,
    command: str,
) -> None:
    """Write ``table.md`` and ``report.html``, with pictures of the held-out embeddings."""
    held = load_file(folder / HELD_OUT)
    count = len(held["rows"])
    cells = format_table(table)
    notes = [*notes, CAPTION.format(count=count, chance=min(10, count - 1) / max(1, count - 1))]
    write_whole(folder / "table.md", "\n\n".join([to_markdown(cells), *notes, ""]).encode())
    light, dark = (_draw(held, samples, dark) for dark in (False, True))
    made = f"{datetime.date.today()}, {provenance.hardware('cpu')}, PyTorch {torch.__version__}"
    again = "<h2>Again</h2>\n<pre>$command</pre>" if command else ""
    sections = "\n".join(f"<h2>{_SECTIONS[name]}</h2>\n${name}" for name in light)
    page = render(
        cells,
        notes,
        light,
        dark,
        template=_TEMPLATE.format(sections=sections, again=again),
        title=_TITLE,
        heading=_TITLE,
        about=about,
        usage=describe_usage(folder, samples.kind),
        command=command,
        made=f"{made}, lightning-rkd {__version__}",
    )
    write_whole(folder / "report.html", page.encode())


def _draw(held: Mapping[str, Tensor], samples: Samples, dark: bool) -> dict[str, Figure]:
    few = torch.randperm(len(held["rows"]), generator=torch.Generator().manual_seed(0))[:_ROWS].sort().values
    embeddings = {name: normalize(held[name][few]) for name in ("teacher", "student")}  # the table is by cosine
    labels = held["labels"][few] if "labels" in held else None
    figures = {}
    if samples.kind == "image":
        images = [np.asarray(x.resize((_SIZE, _SIZE))) for x in samples.fetch(held["rows"][few].tolist())]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        figures["neighbours"] = plots.neighbours(pixels, labels, embeddings, dark=dark)
    if labels is None:
        classes = torch.zeros(len(few), dtype=torch.int64)
        figures["relations"] = plots.relations(embeddings, classes, samples_per_class=96, dark=dark)
    else:
        names = list(samples.class_names) if samples.kind == "image" else None
        figures["relations"] = plots.relations(embeddings, labels, names, dark=dark)
    figures["angles"] = plots.angles(embeddings, dark=dark)
    if samples.kind == "image" and labels is not None:
        figures["map"] = plots.embedding_map(pixels, labels, embeddings, dark=dark)
    return figures
