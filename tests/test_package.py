"""The installed package: names that exist, a complete wheel."""

import doctest
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_rkd
from tests.harness.processes import import_file

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", lightning_rkd.__all__)
def test_public_name_exists_and_is_listed(name: str) -> None:
    assert getattr(lightning_rkd, name) is not None
    assert name in dir(lightning_rkd)
    assert name in vars(lightning_rkd), "a name is looked up once"


def test_unknown_name_is_an_attribute_error_that_says_it() -> None:
    misspelt = "RKDAngel"
    with pytest.raises(AttributeError, match="'lightning_rkd' has no attribute 'RKDAngel'"):
        getattr(lightning_rkd, misspelt)


def test_project_citation_and_changelog_name_this_version() -> None:
    version, project = lightning_rkd.__version__, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version == project["version"]
    assert version == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_forms_for_issues_are_yaml_with_questions() -> None:
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        assert all({"type", "id", "attributes"} <= set(part) for part in yaml.safe_load(form.read_text())["body"])


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
        for suffix in ("py", "yaml", "html", "bib")
        for p in (ROOT / "lightning_rkd").rglob(f"*.{suffix}")
    }
    assert "lightning_rkd/py.typed" in packed
    assert tracked <= packed
    assert {name.partition("/")[0].partition("-")[0] for name in packed} == {"lightning_rkd"}
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_names_of_tests_have_at_most_70_characters() -> None:
    names = [
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    ]
    assert [name for name in names if len(name) > 70] == []


LOSS, EXPORT = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
(ENTRY,) = re.findall(r"^```bibtex\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)


def test_the_loss_in_contributing_runs(tmp_path: Path) -> None:
    file = tmp_path / "cka.py"
    file.write_text(LOSS)
    failed, tried = doctest.testmod(import_file(file))
    assert failed == 0
    assert tried > 0


@pytest.mark.slow
def test_a_new_loss_is_one_file_and_one_export(tmp_path: Path) -> None:
    """Does to a copy what CONTRIBUTING says, and runs the contract on the new loss."""
    for folder in ("lightning_rkd", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    losses = tmp_path / "lightning_rkd" / "losses"
    (losses / "cka.py").write_text(LOSS)
    with (losses / "references.bib").open("a") as bibliography:
        bibliography.write(f"\n{ENTRY}")
    exports = (losses / "__init__.py").read_text()
    (losses / "__init__.py").write_text(exports.replace("if TYPE_CHECKING:\n", f"if TYPE_CHECKING:\n{EXPORT}", 1))
    contract = [
        sys.executable,
        "-m",
        "pytest",
        *["-q", "-p", "no:cacheprovider", "tests/losses/test_contract.py", "-k", "CKA"],
    ]
    own = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(contract, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 15
