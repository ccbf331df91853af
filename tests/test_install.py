"""An installation without extras: what needs an extra names it, and nothing else imports its packages."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rkd.cli.main import main
from tests.harness.forks import run_code

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_rkd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = {
    "docstring_parser",
    "faiss",
    "jsonargparse",
    "matplotlib",
    "numba",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pytorch_metric_learning",
    "rich",
    "scipy",
    "timm",
    "transformers",
}
"""Packages that only extras install."""
NEEDS_AN_EXTRA = ("cli/", "functional/_kernels/", "plots/")
"""Folders that are imported after a check that the extra is installed, or whose imports may fail."""


def imported_with(tree: ast.AST) -> Iterator[str]:
    """Packages that the import of a file imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (name for other in node.orelse for name in imported_with(other))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_with(node)


def test_no_file_imports_a_package_of_an_extra_when_it_is_imported() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    core = {name: path for name, path in files.items() if not name.startswith(NEEDS_AN_EXTRA)}
    found = {name: EXTRA & set(imported_with(ast.parse(path.read_text()))) for name, path in core.items()}
    assert len(core) > 80
    assert {name: packages for name, packages in found.items() if packages} == {}


def test_the_core_needs_six_packages_and_what_they_bring() -> None:
    names = {re.split(r"[\[>=]", requirement)[0] for requirement in PROJECT["dependencies"]}
    brought = {"lightning-utilities", "pillow", "pytorch-lightning", "pyyaml"}
    assert names - brought == {"lightning", "numpy", "safetensors", "torch", "torchmetrics", "torchvision"}


def test_the_extra_all_names_every_extra_but_those_of_developers() -> None:
    extras = PROJECT["optional-dependencies"]
    named = set(re.findall(r"[a-z]+", extras["all"][0].partition("[")[2]))
    assert named == set(extras) - {"all", "dev", "docs", "networks"}


@pytest.mark.parametrize("package", ["rich", "jsonargparse", "scipy"])
def test_a_command_without_its_extra_is_one_line_that_names_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == main(["fit", "--config", "glyphs_rkd"]) == 2
    line = f"error: {package} is not installed: pip install 'lightning-rkd[cli]'\n"
    assert capsys.readouterr().err == 2 * line
    assert main(["--version"]) == 0


@pytest.mark.parametrize("module", ["lightning_rkd.plots", "lightning_rkd.data.datamodules.glyphs"])
def test_pictures_and_glyphs_without_matplotlib_name_the_extra(module: str) -> None:
    code = f"import sys, lightning_rkd.data.datamodules.base; sys.modules['matplotlib'] = None; import {module}"
    with pytest.raises(AssertionError, match=r"matplotlib is not installed: pip install 'lightning-rkd\[plots\]'\n"):
        run_code(code)


@pytest.mark.parametrize("package", ["lightning_rkd", "lightning_rkd.losses"])
def test_importing_the_losses_loads_neither_lightning_nor_an_extra(package: str) -> None:
    names = "*" if package == "lightning_rkd.losses" else "__doc__"  # without "*", losses are loaded on demand
    more = "data.indexing", "data.samplers.pk", "models.small"
    code = (
        f"import sys; from {package} import {names}; assert 'torch._dynamo' not in sys.modules\n"
        + "".join(f"import lightning_rkd.{name}\n" for name in more if names == "*")
        + "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "lightning_rkd" in loaded
    assert ("torch" in loaded) is (package != "lightning_rkd"), "the package alone does not even load torch"
    assert not loaded & (EXTRA | {"lightning", "pytorch_lightning", "torchmetrics", "torchvision", "yaml"})
