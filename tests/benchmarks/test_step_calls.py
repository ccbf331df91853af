"""The engine's own work in a training step."""

from collections import Counter

import pytest

from benchmarks import step_calls


@pytest.mark.parametrize("loss", ["RKD", "RKDDistance"])
def test_a_step_is_at_most_120_calls_in_12_files(monkeypatch, loss):
    monkeypatch.setattr(step_calls, "STEPS", step_calls.WARMUP + 4)
    calls = Counter(step_calls.measure(loss)["calls"])
    assert 0 < calls.total() <= 120
    assert len({name.partition(":")[0] for name in calls}) <= 12
