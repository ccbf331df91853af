"""Tables state mean and spread over seeds, and are read back from CSV unrounded."""

import csv
import statistics
from pathlib import Path

import pytest

from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.schedule import Failure
from lightning_rkd.cli.experiments.tables import Table
from lightning_rkd.cli.experiments.tasks import Task

SCORES = {("teacher", 0): 0.9, ("alone", 0): 0.1, ("alone", 1): 0.3, ("student", 0): 0.2, ("student", 1): 0.5}
TASKS = [Task(name, seed, {}, f"{name}-{seed}") for name, seed in [*SCORES, ("student", 2), ("broken", 0)]]
RUNS = {f"{name}-{n}": Run(1000, 10.0 + n, {"recall_at_1": r}) for (name, n), r in SCORES.items()}
FAILED = {task.folder: Failure(task, "out of luck") for task in TASKS if task.folder not in RUNS}


def test_the_table_states_mean_spread_failures_and_paired_differences() -> None:
    lines = Table(TASKS, RUNS | FAILED, baseline="alone").to_markdown().splitlines()
    assert lines[0] == "| network | parameters | seeds | recall_at_1 | recall_at_1: difference | seconds |"
    assert lines[2:] == [
        "| teacher | 1,000 | 1 | 0.900 |  | 10 |",
        "| alone | 1,000 | 2 | 0.200 ± 0.141 |  | 10 |",
        "| student | 1,000 | 2 (1 failed) | 0.350 ± 0.212 | +0.150 [-0.485, +0.785] | 10 |",
        "| broken |  | failed |  |  |  |",
    ]


def test_a_score_that_no_run_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no network has 'recal'; the scores are recall_at_1"):
        Table(TASKS, RUNS | FAILED, scores=["recal"])


def test_csv_files_are_read_back_unrounded(tmp_path: Path) -> None:
    Table(TASKS, RUNS | FAILED, baseline="alone").write_csv(tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        table = {row["network"]: row for row in csv.DictReader(file)}
    assert float(table["student"]["recall_at_1_spread"]) == statistics.stdev([0.2, 0.5])
    assert float(table["student"]["recall_at_1_difference"]) == pytest.approx(0.15)
    with (tmp_path / "runs.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    found = {(row["network"], int(row["seed"])): row for row in every}
    assert {key: float(row["recall_at_1"]) for key, row in found.items() if not row["error"]} == SCORES
    assert [row["error"] for row in every][-2:] == ["out of luck"] * 2
