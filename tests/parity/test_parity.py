"""Distillation attached from outside is the same computation as the loss written by hand, in every way to train."""

import multiprocessing
import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.harness.ranks import Ranks
from tests.parity import Cell, left_nothing, measure
from tests.parity.__main__ import PAGE
from tests.parity.cells import ON_ONE_DEVICE, ON_TWO_DEVICES
from tests.parity.refused import REFUSED, Refused

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_rkd.distillation.gradient_balance.WeightWarning"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning"),
    pytest.mark.filterwarnings("ignore:BatchNorm normalises each micro-batch:UserWarning"),
    # what torch.compile does inside
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]


SCENARIOS = {
    "stochastic weight averaging",
    "averaged weights",
    "exponentially averaged weights",
    "LBFGS with strong_wolfe",
    "activation checkpointing, reentrant, the layer around it",
    "dataloader_iter",
    "two passes in a step",
    "a compiled student",
    "a module compiled by inductor",
    "fp16 with a scaler, clipping",
    "bf16-mixed",
    "learning rate finder",
    "batch size finder",
    "DDP",
    "DDP, uneven batches",
    "DDP, two passes in a step",
    "FSDP2",
    "FSDP2, accumulation",
}
"""Cells that are rows of docs/tested.md as well."""


def named(cells: Sequence[Cell | Refused]) -> list[Any]:
    scenario = pytest.mark.scenario("loops", "")
    return [
        pytest.param(cell, id=str(cell), marks=[pytest.mark.slow] * cell.slow + [scenario] * (cell.name in SCENARIOS))
        for cell in cells
    ]


def check(cell: Cell, ranks: Ranks | None = None) -> None:
    figures = measure(cell, ranks)
    assert figures.gradients <= cell.limit
    assert figures.weights <= cell.limit
    assert figures.effect > 1e-3, "distillation changes nothing here, so the test would prove nothing"


@pytest.mark.parametrize("cell", named(ON_ONE_DEVICE))
def test_distillation_is_the_loss_written_by_hand(cell: Cell) -> None:
    check(cell)


@pytest.mark.parametrize("cell", named(ON_TWO_DEVICES))
def test_on_two_devices_distillation_is_the_loss_written_by_hand(ranks: Ranks, cell: Cell) -> None:
    check(cell, ranks)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("SpawnProcess") and not p.daemon]


@pytest.mark.parametrize("cell", named(REFUSED))
def test_what_cannot_be_the_same_is_refused_with_the_cure(cell: Refused) -> None:
    run = cell.build("ours")
    run.callbacks[:0] = [make() for make in cell.before]
    with pytest.raises(cell.error, match=re.escape(cell.message)):
        run.fit()
    left_nothing(run.module, *run.callbacks)


def test_every_cell_has_a_name_of_its_own() -> None:
    names = [str(cell) for cell in [*ON_ONE_DEVICE, *ON_TWO_DEVICES, *REFUSED]]
    assert len(set(names)) == len(names)


def test_the_page_in_the_docs_lists_these_cells_and_no_other() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [row for row in rows if row.strip("| ")]
    expected = [cell.name for cell in [*ON_ONE_DEVICE, *ON_TWO_DEVICES]] + [str(c) for c in REFUSED]
    assert sorted(cells) == sorted(expected)
