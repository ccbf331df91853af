"""Writes ``docs/losses.md``: every loss and scheme with its paper, equation and needs, read off the classes themselves.

Run ``python docs/gallery.py`` after a loss has changed; a test compares the page with the classes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning_rkd.experimental
import lightning_rkd.losses
import lightning_rkd.modules
from lightning_rkd.losses import Reference, RelationalLoss

PAGE = Path(__file__).parent / "losses.md"

PROVENANCE = {
    "read in code": "formula read in code",
    "read in paper": "formula read in the paper",
    "from memory": "formula from memory, not checked against a source",
    "ours": "of this library, after the paper",
    "reconstruction": "**reconstruction**: no complete source could be found",
}

NOT_SHIPPED: dict[str, str] = {
    "VRM": "Virtual Relation Matching (Zhang et al. 2025, arXiv:2502.20760). Known are its edges between samples and "
    "between classes over two views, a Huber loss and that only real-virtual edges are kept. Paper and code could not "
    "be read in full; missing are the criterion and the share of edges that are pruned as unreliable, the Huber "
    "threshold and form, the reduction over edges, both weights, where logits are standardised, and the augmentation "
    "of the second view.",
    "The gradient relation of CRCD": "`CRCD` has the feature relation. The gradient relation, the same loss on the "
    "gradients of the cross-entropy at the features, is defined in the authors' repository (helper/loops.py, weight "
    "1.0). It is not implemented here: there it multiplies the soft-target loss, and takes gradients of "
    "the teacher's cross-entropy.",
    "The attention fusion of OKDMDE": "`OnlineBranches` takes the mean of the branches' logits; the layers of the "
    "paper's Feature Fusion Module could not be found.",
    "One network split into student and assistant": "`ResidualKD` trains two networks. How the paper separates the "
    "channels of one is not known.",
    "Score distillation of EmbedDistill": "`EmbedDistill` matches embeddings; no complete formula of the score term "
    "could be found.",
    "The queue of lightly-train's distillation": "it is `CSD(bank_size=8192, student_temperature=0.07, "
    "teacher_temperature=0.07)`; `RRD` compares with a queue as well, in a space of its own.",
    "FLRKD, Graph Flow, ReKD": "only titles, tables or parts of code could be found, and no formula.",
}
"""Methods that were looked for and left out, with what is missing."""


def losses() -> dict[str, type[Any]]:
    """The exported losses, in alphabetical order whatever the case."""
    packages = (lightning_rkd.losses, lightning_rkd.experimental)
    found = {name: getattr(package, name) for package in packages for name in package.__all__}
    kept = {
        n: c
        for n, c in found.items()
        if inspect.isclass(c) and issubclass(c, RelationalLoss) and c is not RelationalLoss
    }
    return dict(sorted(kept.items(), key=lambda item: item[0].lower()))


def schemes() -> dict[str, type[Any]]:
    """The exported training schemes."""
    packages = (lightning_rkd.modules, lightning_rkd.experimental)
    found = {name: getattr(package, name) for package in packages for name in package.__all__}
    kept = {n: c for n, c in found.items() if inspect.isclass(c) and not issubclass(c, RelationalLoss)}
    return {name: c for name, c in sorted(kept.items()) if getattr(c, "reference", None)}


def summary(cls: type[Any]) -> str:
    """The first sentence of the docstring, as Markdown."""
    return markdown((inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "))


def equation(cls: type[Any]) -> str:
    """The first displayed equation of the docstring, in TeX."""
    match = re.search(r"^\.\. math::(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    lines = [] if match is None else [line.strip() for line in match.group(1).strip().splitlines()]
    return "\n".join(line for line in lines if line)


def markdown(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def weight(reference: Reference) -> str:
    """The published weight and its setting."""
    number = "" if reference.weight is None else f"{reference.weight:g}"
    return ", ".join(part for part in (number, reference.weight_note) if part) or "not known"


def reads(cls: type[Any]) -> str:
    """The fields of the outputs that a loss reads."""
    return cls.reads if isinstance(cls.reads, str) else ", ".join(cls.reads)


def needs(cls: type[Any]) -> str:
    """Context that a loss requires besides student and teacher, optional ones in brackets; required sizes."""
    context = [name if name in cls.required else f"({name})" for name in sorted(cls.needs - {"shard"})]
    sizes = [name for name in cls.needed_sizes if name == "num_samples"]
    return ", ".join([*context, *sizes]) or "nothing"


def row(name: str, cls: type[Any]) -> str:
    """A line of the table of losses."""
    invariances = ", ".join(sorted(cls.invariances)) or "none"
    link, aligns = f"[`{name}`](#{name.lower()})", "yes" if cls.aligns else "no"
    return f"| {link} | {reads(cls)} | {needs(cls)} | {invariances} | {aligns} | {weight(cls.reference)} |"


def entry(name: str, cls: type[Any]) -> str:
    """The section about one method."""
    reference: Reference = cls.reference
    loss = issubclass(cls, RelationalLoss)
    own = loss and bool(cls.needed_sizes)
    facts = {
        "import": f"`from {cls.__module__.rpartition('.')[0]} import {name}`",
        "paper": reference.citation,
        "provenance": f"{PROVENANCE[reference.provenance]} ({reference.source})",
        "published weight": weight(reference),
        "published result": reference.result or "none found",
    }
    if loss:
        facts["reads"] = reads(cls)
        facts["needs"] = needs(cls)
        facts["unchanged by"] = ", ".join(sorted(cls.invariances)) or "nothing in particular"
        facts["aligns with the teacher's space"] = "yes" if cls.aligns else "no"
        facts["relates samples"] = "yes" if cls.gather else "no: a mean over samples"
        facts["tensors of its own"] = "yes" if own else "no"
    lines = [f"### {name}", "", summary(cls), ""]
    if tex := equation(cls):
        lines += ["$$", tex, "$$", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "<details><summary>BibTeX</summary>", "", "```bibtex", reference.bibtex, "```", ""]
    return "\n".join([*lines, "</details>", ""])


def page() -> str:
    """The whole page."""
    every, trained = losses(), schemes()
    lines = [
        "# The losses",
        "",
        "Generated by `python docs/gallery.py` from the classes themselves. Every loss is called "
        "`loss(student, teacher)`, goes into `DistillationModule(loss=...)`, `RelationalDistillation(loss=...)` or a "
        "recipe (`--model.loss=NAME`), and keeps one contract: float32 inside, finite gradients for duplicate rows, "
        "the same on one device and on many. Optional needs stand in brackets. Weights are those published, "
        "for long schedules; [choosing a weight](weights.md) says how to find what suits your data, and "
        "[which loss?](which_loss.md) which few to try.",
        "",
        "A loss of another package is known to the command line by its short name, in recipes and `compare`, once that "
        "package is installed with an entry point:",
        "",
        "```toml",
        '[project.entry-points."lightning_rkd.losses"]',
        'MeanGap = "my_package.losses:MeanGap"',
        "```",
        "",
        "A loss that *aligns* brings the student's embedding into the teacher's space, so that it can query a gallery "
        "that the teacher has embedded. A student trained by the others alone needs a gallery of its own. `Tanimoto` "
        "aligns with `form='sample'`.",
        "",
        "| loss | reads | needs | unchanged by | aligns | published weight |",
        "|---|---|---|---|---|---|",
        *(row(name, cls) for name, cls in every.items()),
        "",
        "Methods that are a way of training rather than a loss: "
        + ", ".join(f"[`{name}`](#{name.lower()})" for name in trained)
        + ".",
        "",
        "## Losses, one by one",
        "",
        *(entry(name, cls) for name, cls in every.items()),
        "## Training schemes",
        "",
        *(entry(name, cls) for name, cls in trained.items()),
        "## Not shipped",
        "",
        "Looked for and left out, rather than guessed:",
        "",
        *(f"- **{name}**: {why}" for name, why in NOT_SHIPPED.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}: {len(losses())} losses, {len(schemes())} schemes")
