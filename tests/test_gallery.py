"""The gallery page is what the classes say, and says all that it promises."""

import importlib.util
from pathlib import Path
from types import ModuleType

import lightning_rkd.losses
from lightning_rkd.losses.references import bibliography

DOCS = Path(__file__).parents[1] / "docs"


def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "losses.md").read_text(encoding="utf-8") == gallery().page(), "run python docs/gallery.py"


def test_every_method_has_its_equation_paper_and_bibtex_entry() -> None:
    page = gallery()
    for name, cls in (page.losses() | page.schemes()).items():
        assert page.equation(cls), name
        assert "```bibtex\n@" in page.entry(name, cls), name
        assert cls.reference.citation, name
        assert not any(mark in page.entry(name, cls) for mark in (":math:", ":class:", ":func:")), name


def test_every_entry_of_the_bibliography_belongs_to_a_method() -> None:
    page = gallery()
    assert {cls.reference.key for cls in (page.losses() | page.schemes()).values()} == set(bibliography())


def test_a_reconstruction_is_called_one() -> None:
    page = gallery()
    assert "**reconstruction**" in page.entry("STKD", lightning_rkd.losses.STKD)


def test_what_is_not_shipped_is_listed_with_what_is_missing() -> None:
    page = gallery()
    for name, why in page.NOT_SHIPPED.items():
        assert len(why) > 40, name
        assert not hasattr(lightning_rkd.losses, name)
