"""The papers behind the losses and training schemes: ``references.bib``, and what each class says beside its entry."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

BIBLIOGRAPHY = Path(__file__).with_name("references.bib")


@dataclass(frozen=True)
class Reference:
    """The paper of a method, where its formula was read, and the published weight and result.

    Attributes:
        key: Of the paper's entry in ``references.bib``.
        provenance: How the formula was obtained.
        source: Where it was read.
        weight: The published weight, ``None`` where none is known.
        weight_note: The setting that the weight belongs to.
        result: The published result with its setting and origin; empty where none is known.
    """

    key: str
    provenance: Literal["read in code", "read in paper", "from memory", "reconstruction", "ours"]
    source: str = ""
    weight: float | None = None
    weight_note: str = ""
    result: str = ""

    @property
    def bibtex(self) -> str:
        """The BibTeX entry of the paper."""
        return bibliography()[self.key]

    @property
    def citation(self) -> str:
        """Authors, year, title, and the arXiv number, the place of publication or the address."""
        fields = {
            name: re.sub(r"[{}]|(?<=\s)\s+", "", value.replace("\n", " "))
            for name, value in re.findall(r"^ +(\w+) *= \{(.*?)\},?$", self.bibtex, re.DOTALL | re.MULTILINE)
        }
        *names, last = [author.split(",")[0] for author in fields["author"].split(" and ")]
        authors = f"{', '.join(names)} and {last}" if names else last
        place = fields.get("booktitle", "").rpartition("(")[2].rstrip(")")
        where = f"arXiv:{fields['eprint']}" if "eprint" in fields else fields.get("doi", place or fields.get("url", ""))
        return f"{authors} {fields['year']}, {fields['title']}, {where}"


class BibTeX:
    """The BibTeX entry of a class with a ``reference``, as a class attribute; empty where there is no reference."""

    def __get__(self, instance: object, owner: Any) -> str:
        return "" if owner.reference is None else str(owner.reference.bibtex)


@cache
def bibliography() -> dict[str, str]:
    """All entries of ``references.bib`` by key."""
    entries = BIBLIOGRAPHY.read_text(encoding="utf-8").strip().split("\n\n")
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}
