"""Extreme inputs of losses and metrics, as real networks give them, drawn by hypothesis."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

SCALES = (1.0, 1e-30, 1e-20, 1e-10, 1e-4, 1e4, 1e10, 1e20, 1e30)
TROUBLES = (
    "duplicates", "all equal", "near duplicates", "constant columns", "zero rows", "all zero", "uneven rows", "sparse",
    "far away", "very far away",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "strided", "transposed", "reversed strides")

MISFITS: dict[str, Callable[[Tensor], Any]] = {
    "no columns": lambda x: x[:, :0],
    "one dimension": lambda x: x.flatten(),
    "no dimension": lambda x: x.sum(),
    "whole numbers": lambda x: x.long(),
    "truth values": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "eight bits": lambda x: x.to(torch.float8_e4m3fn),
    "a sparse tensor": lambda x: x.to_sparse(),
    "numbers elsewhere": lambda x: x.to("meta"),
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "nothing": lambda x: None,
}
"""Objects that are passed in place of rows (N, D)."""


@dataclass(frozen=True)
class Wild:
    """Extreme numbers of one network; ``of`` makes them."""

    scale: float = 1.0  # what a dtype does not have is cut off at its largest number
    troubles: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def another(self, number: int) -> Self:
        """The same troubles with other numbers."""
        return replace(self, seed=self.seed + number)

    def of(self, *shape: int) -> Tensor:
        """Numbers (N, ...); a bare vector, which is a classifier's bias, suffers from nothing."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        if len(shape) == 1:
            return normal(*shape).to(self.dtype)
        n = shape[0]
        x = normal(n, math.prod(shape[1:]))
        if "sparse" in self.troubles:
            x = x.relu()
        if "constant columns" in self.troubles:
            x[:, ::2] = x[0, ::2].clone()
        if "near duplicates" in self.troubles:
            x[n // 2 :] = x[: n - n // 2] + 1e-4 * normal(n - n // 2, x.shape[1])
        if "duplicates" in self.troubles:
            x = x[torch.randint(n // 2 + 1, (n,), generator=generator)]
        if "uneven rows" in self.troubles:
            x *= 10.0 ** -(torch.arange(n) % 4).double()[:, None]
        for trouble, offset in (("far away", 1e3), ("very far away", 1e6)):
            if trouble in self.troubles:
                x = x / offset + normal(1, x.shape[1])
        if "zero rows" in self.troubles:
            x[::2] = 0
        if "all equal" in self.troubles:
            x[:] = x[0].clone()
        if "all zero" in self.troubles:
            x[:] = 0
        most = torch.finfo(self.dtype).max
        return _laid_out((x * self.scale).clamp(-most, most).to(self.dtype).view(shape), self.layout)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":  # every second column of something wider
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":  # rows are the inner dimension
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "reversed strides":  # the last dimension lies outermost
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return x


def wild(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[Wild]:
    """Outputs of any scale, with up to two troubles at once."""
    return st.builds(
        Wild,
        scale=st.sampled_from(SCALES),
        troubles=st.frozensets(st.sampled_from(TROUBLES), max_size=2),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 10_000),
    )
