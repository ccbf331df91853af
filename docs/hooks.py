"""Generated pages of the site: the reference, the notebooks, CONTRIBUTING and its architecture; and equations.

Hooks of mkdocs; ``make docs`` builds the site.
"""

from __future__ import annotations

import html
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "lightning_rkd": "Callbacks and the rest of the top level",
    "lightning_rkd.losses": "Losses",
    "lightning_rkd.modules": "Modules",
    "lightning_rkd.experimental": "Experimental",
    "lightning_rkd.metrics": "Metrics",
    "lightning_rkd.distillation.teachers": "Teachers",
    "lightning_rkd.data": "Data",
    "lightning_rkd.models": "Models",
    "lightning_rkd.plots": "Plots",
    "lightning_rkd.export": "Export",
    "lightning_rkd.functional": "Functional",
}
"""Packages in the reference, with the titles of their pages."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the navigation of notebooks and reference."""
    parts = {
        "Notebooks": [{title(path): f"notebooks/{path.stem}.md"} for path in notebooks()],
        "Reference": [{words: f"reference/{package.replace('.', '_')}.md"} for package, words in PACKAGES.items()],
    }
    for entry in config.nav or []:
        for name in entry:
            entry[name] = parts.get(name, entry[name])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for package, words in PACKAGES.items():
        page = f"reference/{package.replace('.', '_')}.md"
        files.append(File.generated(config, page, content=reference(package, words)))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=contributing))
    files.append(File.generated(config, "architecture.md", content=architecture(contributing)))
    for path in notebooks():
        body, images = converted(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=body))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{path.stem}_files/{name}", content=content))
    return files


def on_page_content(content: str, **kwargs: Any) -> str:
    """Convert equations to MathML, which browsers draw without a script."""
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    text = html.unescape(re.sub(r"^\\[(\[]|\\[)\]]$", "", found[2].strip()))
    text = re.sub(r"\\[bB]igg?[lrm]?(?=\\)", "", text)  # the converter knows these before brackets only
    text = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", text)
    display = "block" if found[1] == "div" else "inline"
    mathml = latex2mathml.converter.convert(" ".join(text.split()), display=display)
    return f'<div class="equation">{mathml}</div>' if display == "block" else mathml


def architecture(contributing: str) -> str:
    """The section "Architecture" as a page.

    >>> architecture("# Contributing\\n## Architecture\\nFolders.\\n## Style\\n")
    '# Architecture\\nFolders.\\n'
    """
    return re.sub(r".*^## (Architecture$.*?)^## .*", r"# \1", contributing, flags=re.MULTILINE | re.DOTALL)


def reference(package: str, words: str) -> str:
    """A page with the public names of a package in alphabetical order."""
    module = import_module(package)
    lines = [f"# {words}", f"`{package}`: {(module.__doc__ or '').strip().splitlines()[0]}"]
    for path in public(package):
        if package == "lightning_rkd" and any(path in public(other) for other in PACKAGES if other != package):
            continue
        lines += [f"::: {path}", "    options: {heading_level: 2}"]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n"


def public(package: str) -> list[str]:
    """Full paths of the public names of a package.

    >>> "lightning_rkd.losses.rkd.RKD" in public("lightning_rkd.losses")
    True
    """
    module = import_module(package)
    found = [getattr(module, name) for name in sorted(getattr(module, "__all__", vars(module)), key=str.lower)]
    places = [f"{x.__module__}.{x.__qualname__}" for x in found if inspect.isclass(x) or inspect.isfunction(x)]
    return [place for place in places if place.startswith("lightning_rkd")]


def notebooks() -> list[Path]:
    """The notebooks, in reading order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def title(path: Path) -> str:
    """The first heading of a notebook."""
    first: str = nbformat.read(path, as_version=4).cells[0].source
    return first.splitlines()[0].lstrip("# ")


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its images."""
    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
    images = resources["outputs"]
    for name in images:
        body = body.replace(f"]({name})", f"]({path.stem}_files/{name})")
    body = re.sub(r"\]\(\.\./docs/", "](../", body)
    body = body.replace("](../CONTRIBUTING.md)", "](../contributing.md)")
    body = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", body)
    return body, images
