"""The README's examples run as they stand, and its first promise holds bit for bit."""

import copy
import csv
import re
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.harness.processes import run_script

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def block(containing: str) -> str:
    found = [b for b in BLOCKS if containing in b]
    assert len(found) == 1, f"{len(found)} examples contain {containing!r}"
    return found[0]


YOURS = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

module = Classifier()
teacher = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 128))
data = DataLoader(TensorDataset(torch.rand(320, 1, 28, 28), torch.randint(10, (320,))), batch_size=64)
"""
"""Module, teacher and data that a reader brings to the example of the callback."""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_example_runs_as_a_file_of_its_own(number: int, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(YOURS + BLOCKS[number] if "RelationalDistillation(" in BLOCKS[number] else BLOCKS[number])
    code, output = run_script(file)
    assert code == 0, output[-3000:]


def test_the_attach_example_trains_as_the_loss_written_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(YOURS, names)
    written = copy.deepcopy(names["module"])
    exec(block("RelationalDistillation("), names)

    class ByHand(names["Classifier"]):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            student = self.backbone(x)
            with torch.no_grad():
                teacher = names["teacher"](x)
            return torch.nn.functional.cross_entropy(self.head(student), y) + names["RKD"]()(student, teacher)

    written.__class__ = ByHand
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=5, **quiet).fit(written, names["data"])

    for (name, a), b in zip(names["module"].named_parameters(), written.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_results_it_quotes_are_those_of_the_page() -> None:
    page = (README.parent / "docs" / "results.md").read_text().replace("*", "").splitlines()
    quoted = re.findall(
        r"\| (0\.\d{3} ± 0\.\d{3}) \| ([+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\])? ?\|",
        README.read_text().split("intents of Banking77")[1].split("## Compress")[0],
    )
    assert len(quoted) == 9
    for value, gain in quoted:
        assert any(f"| {value} | {gain}" in line for line in page), (value, gain)


def test_the_compression_it_quotes_is_that_of_the_benchmark() -> None:
    with (README.parent / "benchmarks" / "results" / "distill.csv").open() as file:
        runs = list(csv.DictReader(file))
    for task in sorted({run["task"] for run in runs}):
        for score in ("recall@1", "recall@1, teacher's gallery"):
            values = [float(run[score]) for run in runs if run["task"] == task]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            for page in ("README.md", "docs/distill.md", "docs/which_loss.md"):
                assert f"{statistics.fmean(values):.3f}{spread}" in (README.parent / page).read_text(), (page, score)


def test_the_differences_of_which_loss_are_those_of_the_results() -> None:
    page, results = ((README.parent / "docs" / f"{name}.md").read_text() for name in ("which_loss", "results"))
    quoted = re.findall(r"[+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", page)
    assert len(quoted) > 5
    assert [one for one in quoted if one not in results] == []


def test_the_speed_it_quotes_is_that_of_the_page() -> None:
    page = (README.parent / "docs" / "speed" / "rkd_angle.md").read_text()
    measured = {
        int(n): (float(kernel), float(formula), float(faster))
        for n, kernel, formula, faster in re.findall(
            r"^\| (\d+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+)x \|", page, flags=re.MULTILINE
        )
    }
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) ms \| ([\d,]+) ms \| (\d+)x \|", README.read_text(), flags=re.MULTILINE)
    assert len(rows) == 3
    for n, kernel, formula, faster in rows:
        ours = measured[int(n)]
        assert float(kernel) == pytest.approx(ours[0], rel=0.1)
        assert float(formula.replace(",", "")) == pytest.approx(ours[1], rel=0.02)
        assert float(faster) == pytest.approx(ours[2], rel=0.03)
