"""How long a network takes on this machine's processor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Latency(NamedTuple):
    """Median of some calls.

    Attributes:
        program: What ran.
        batch: Rows at once.
        milliseconds: Of one call.
    """

    program: str
    batch: int
    milliseconds: float


def latencies(network: nn.Module, example: Tensor, onnx: Path, batches: tuple[int, ...] = (1, 32)) -> list[Latency]:
    """Times of the network and, where there is one, of its ONNX file.

    Example:
        >>> found = latencies(nn.Linear(3, 2), torch.zeros(1, 3), Path("no such file"), batches=(4,))
        >>> [(one.program, one.batch, one.milliseconds > 0) for one in found]
        [('PyTorch', 4, True)]
    """
    found = []
    for batch in batches:
        x = example.expand(batch, *example.shape[1:]).contiguous()
        with torch.inference_mode():
            found.append(Latency("PyTorch", batch, _median(lambda x=x: network(x))))  # type: ignore[misc]
    if onnx.is_file():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for batch in batches:
            rows = example.expand(batch, *example.shape[1:]).contiguous().numpy()
            found.append(Latency("onnxruntime", batch, _median(lambda rows=rows: session.run(None, {name: rows}))))  # type: ignore[misc]
    return found


def _median(call: Callable[[], object], calls: int = 20, seconds: float = 1.0) -> float:
    """Milliseconds of a call, after one to warm up; fewer calls where they would take longer than ``seconds``."""
    call()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < calls and (len(taken) < 3 or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)
