"""What a user of the installed package relies on: cheap imports, names that exist, a wheel that is complete."""

from __future__ import annotations

import doctest
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lightning_rkd

ROOT = Path(__file__).parent.parent
HEAVY = {
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numba",
    "pytorch_lightning",
    "pytorch_metric_learning",
    "torchvision",
}


@pytest.mark.parametrize("module", ["lightning_rkd", "lightning_rkd.losses", "lightning_rkd.losses.rkd"])
def test_import_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert module.partition(".")[0] in loaded
    assert not HEAVY & set(loaded)


def test_bare_import_does_not_even_load_torch() -> None:
    code = "import sys, lightning_rkd; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", lightning_rkd.__all__)
def test_public_name_exists_and_is_listed(name: str) -> None:
    assert getattr(lightning_rkd, name) is not None
    assert name in dir(lightning_rkd)
    assert name in vars(lightning_rkd), "a name is looked up once"


def test_unknown_name_is_an_attribute_error_that_says_it() -> None:
    misspelt = "RKDAngel"
    with pytest.raises(AttributeError, match="'lightning_rkd' has no attribute 'RKDAngel'"):
        getattr(lightning_rkd, misspelt)


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lightning_rkd.__version__ == project["version"]


def test_changelog_has_a_section_for_this_version() -> None:
    assert f"## [{lightning_rkd.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_floor_and_ignored_warning_states_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    floors = [line for line in lines if re.match(r'\s+"[\w\[\]-]+>=', line)]
    ignored = [i for i, line in enumerate(lines) if re.match(r"\s+['\"]ignore:", line)]
    assert floors
    assert ignored
    assert [line for line in floors if "#" not in line] == []
    assert [lines[i] for i in ignored if not lines[i - 1].lstrip().startswith("#")] == []


@pytest.mark.slow
def test_wheel_built_from_the_source_archive_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        p.relative_to(ROOT).as_posix()
        for suffix in ("py", "yaml")
        for p in (ROOT / "lightning_rkd").rglob(f"*.{suffix}")
    }
    assert "lightning_rkd/py.typed" in packed
    assert tracked <= packed
    assert {name.partition("/")[0].partition("-")[0] for name in packed} == {"lightning_rkd"}
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_the_loss_in_contributing_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    file = tmp_path / "similarity.py"
    file.write_text(block)
    spec = importlib.util.spec_from_file_location("similarity", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried > 0
