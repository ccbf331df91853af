"""The campaign of kills sees every difference between what a resumed run leaves and what an unbroken one does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults import differences
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.tables import Table
from lightning_rkd.cli.experiments.tasks import Task


def left(folder: Path, seconds: float = 1.0, score: float = 0.5, shift: float = 0.0) -> Path:
    """Files of a demo, written by its own functions, and a checkpoint."""
    folder.mkdir()
    x = torch.arange(6.0).view(3, 2) + shift
    torch.save({"seconds": seconds, "scores": {"recall_at_1": score}, "embeddings": x}, folder / "result.pt")
    state: dict[str, Any] = {"state_dict": {"weight": x}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(state | {"global_step": 3, "epoch": 1, "callbacks": {"path": str(folder)}}, folder / "last.ckpt")
    run = Run(3880, seconds, {"recall_at_1": score})
    table = Table([Task("student", 0, {}, "student-0")], {"student-0": run})
    table.write_csv(folder)
    (folder / "table.md").write_text(f"{table.to_markdown()}\nWith RKD-DA it changes by {10 * score:+.1f} points.\n")
    (folder / "config.yaml").write_text(f"out: {folder}\n")
    return folder


def test_runs_that_differ_in_their_clocks_and_folders_are_the_same(tmp_path: Path) -> None:
    assert differences(left(tmp_path / "whole"), left(tmp_path / "resumed", seconds=123.0)) == []


def test_another_score_or_number_anywhere_is_a_difference(tmp_path: Path) -> None:
    whole = left(tmp_path / "whole")
    tables = ["result.pt", "runs.csv", "table.csv", "table.md"]
    assert differences(whole, left(tmp_path / "score", score=0.75)) == tables
    assert differences(whole, left(tmp_path / "shift", shift=1e-6)) == ["last.ckpt", "result.pt"]


@pytest.mark.parametrize("name", ["result.pt", "last.ckpt", "runs.csv", "table.csv", "table.md", "config.yaml"])
def test_a_file_that_is_missing_or_left_over_is_a_difference(name: str, tmp_path: Path) -> None:
    whole, resumed = left(tmp_path / "whole"), left(tmp_path / "resumed")
    (resumed / name).unlink()
    assert differences(whole, resumed) == differences(resumed, whole) == [name]


def test_a_sentence_beside_the_table_counts_too(tmp_path: Path) -> None:
    whole = left(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "resumed")
    page = tmp_path / "resumed" / "table.md"
    page.write_text(page.read_text().replace("+5.0 points", "+5.1 points"))
    assert differences(whole, tmp_path / "resumed") == ["table.md"]
