"""Descriptions of functions are the same in every run, and others for every function that computes something else."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from lightning_rkd.data import Renormalize, Resize
from lightning_rkd.data.fingerprint import describe_functions
from tests.harness.forks import run_code

SCALE = 2.0


def by_scale(x: Any) -> Any:
    return x * SCALE


def adding(n: float) -> Any:
    return lambda x: x + n


class Shift:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return x + self.by

    def method(self, x: Any) -> Any:
        return x - self.by


class Buffered(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value), persistent=False)


PAIRS: dict[str, tuple[Any, Any]] = {
    "constants": (lambda x: x + 1, lambda x: x + 2),
    "names": (lambda x: x.sin(), lambda x: x.cos()),
    "sets": (lambda x: x in {"a", "b", "c", "d"}, lambda x: x in {"a", "b", "c", "e"}),
    "closures": (adding(1), adding(2)),
    "defaults": (lambda x, n=1: x + n, lambda x, n=2: x + n),
    "partials": (partial(adding, 1), partial(adding, n=2)),
    "objects": (Shift(1), Shift(2)),
    "methods": (Shift(1).method, Shift(2).method),
    "sizes": (Resize(8), Resize(9)),
    "statistics": (Renormalize((0.5, 0.5), (0, 1)), Renormalize((0.5, 0.5), (0, 2))),
    "buffers": (Buffered(1.0), Buffered(2.0)),
    "torchvision's": (v2.Compose([v2.Resize(8)]), v2.Compose([v2.Resize(8, v2.InterpolationMode.BICUBIC)])),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_functions_that_differ_are_described_differently(pair: str) -> None:
    first, second = PAIRS[pair]
    assert describe_functions([first]) == describe_functions([first])
    assert describe_functions([first]) != describe_functions([second])
    assert describe_functions([first, second]) != describe_functions([second, first])


def test_globals_of_a_function_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_functions([by_scale])
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert describe_functions([by_scale]) != before


def test_the_mode_of_a_module_does_not_count() -> None:
    assert describe_functions([nn.Sequential(Resize(8)).train()]) == describe_functions(
        [nn.Sequential(Resize(8)).eval()]
    )


def test_no_function_is_none() -> None:
    assert describe_functions([]) == "none"


@pytest.mark.slow
def test_descriptions_are_the_same_in_another_process() -> None:
    ours = [describe_functions([f]) for pair in PAIRS.values() for f in pair]
    code = f"from {__name__} import *; print([describe_functions([f]) for pair in PAIRS.values() for f in pair])"
    assert run_code(code).strip() == str(ours)
