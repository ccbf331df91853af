"""Bytes that devices exchange in a step, as the page on scaling states them."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rkd import RKD, RelationalDistillation
from tests.callbacks.test_ddp import batches
from tests.harness import toys
from tests.harness.ranks import Ranks


def counted(rank: int, steps: int) -> dict[str, int]:
    """Bytes that this rank ends up with, by collective, in a training of so many steps; DDP's own are not seen."""
    seen: Counter[str] = Counter()

    def size(x: Any) -> int:
        return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(size, x))

    def watched(name: str) -> Any:
        call = getattr(dist, name)

        def wrapped(x: Any, *args: Any, **kwargs: Any) -> Any:
            seen[name] += size(x)
            return call(x, *args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch, toys.devices(rank) as where:
        for name in ("all_gather", "all_reduce", "broadcast"):
            patch.setattr(dist, name, watched(name))
        callback = RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")
        toys.fit(toys.Student(), callback, batches=batches(rank), max_steps=steps, **where)
    return dict(seen)


def test_bytes_of_a_step_are_those_of_the_cost_model(ranks: Ranks) -> None:
    n, k, d_s, d_t = 16, 2, 5, 7
    with torch.no_grad():
        assert toys.Backbone()(torch.randn(1, toys.WIDTH)).shape[1] == d_s
        assert toys.teacher()(torch.randn(1, toys.WIDTH)).shape[1] == d_t
    for few, many in zip(ranks.run(counted, 2), ranks.run(counted, 5), strict=True):
        step = {name: (many[name] - few[name]) / 3 for name in many}
        assert step["all_gather"] == 4 * n * (d_s + d_t) + 8 * k
        assert step["all_reduce"] == 4 * n * d_s + 4 * n * d_s + 4
