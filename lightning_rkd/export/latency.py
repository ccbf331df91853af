"""Latency of a network on the processor of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Latency(NamedTuple):
    """Median time of a call of a program with a batch of some rows."""

    program: str
    batch: int
    milliseconds: float


def measure_latency(
    network: nn.Module, example: Tensor, onnx: Path, batches: tuple[int, ...] = (1, 32)
) -> list[Latency]:
    """Measure the network and, if the file exists, its ONNX program.

    Example:
        >>> found = measure_latency(nn.Linear(3, 2), torch.zeros(1, 3), Path("no such file"), batches=(4,))
        >>> [(one.program, one.batch, one.milliseconds > 0) for one in found]
        [('PyTorch', 4, True)]
    """
    programs: dict[str, Callable[[Tensor], object]] = {"PyTorch": network}
    if onnx.is_file():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        programs["onnxruntime"] = lambda x: session.run(None, {name: x.numpy()})
    found = []
    for program, call in programs.items():
        for batch in batches:
            x = example.expand(batch, *example.shape[1:]).contiguous()
            with torch.inference_mode():
                found.append(Latency(program, batch, _median_milliseconds(call, x)))
    return found


def _median_milliseconds(call: Callable[[Tensor], object], x: Tensor, calls: int = 20, seconds: float = 1.0) -> float:
    """Median of several calls after a first one; at least 3, and fewer than ``calls`` where they exceed ``seconds``."""
    call(x)
    times: list[float] = []
    while len(times) < 3 or (len(times) < calls and sum(times) < seconds):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return 1000 * median(times)
