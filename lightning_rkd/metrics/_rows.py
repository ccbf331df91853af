"""What metrics over rows of embeddings share: a state of rows that stay on their rank, checked and numbered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.utils.distributed import gather_rows

_RANGE = 1e150  # squares of what lies within it, and of its inverse, are in the range of float64
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowMetric(Metric):
    """A metric whose state is lists of rows: floating embeddings, and integers that no change of precision touches.

    States are not synchronised by torchmetrics; ``compute`` of a subclass does what little exchange it needs.
    Calling the metric only updates it: a value for one batch would cost a search and mean little.
    """

    full_state_update: bool = False
    _floats: ClassVar[tuple[str, ...]]
    _integers: ClassVar[tuple[str, ...]]
    indices: list[Tensor]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in (*self._floats, *self._integers):
            self.add_state(name, [], dist_reduce_fx="cat")

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Update, and return nothing."""
        self.update(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> RowMetric:
        super()._apply(fn, exclude_state=(*exclude_state, *self._integers))
        for name in self._integers:  # set_dtype would round labels to the new precision; devices still follow
            setattr(self, name, [part.to(fn(part).device) for part in getattr(self, name)])
        return self

    def _add_indices(self, indices: Tensor | None, rows: int, updated: bool) -> None:
        """Keep the indices of an update, which come always or never."""
        same_as_before(indices is not None, self.indices, updated, "indices")
        if indices is not None:
            self.indices.append(checked_column(indices, rows, "indices"))

    def _joined(self, name: str) -> Tensor | None:
        """The rows of a state as one tensor, which also replaces the pieces; ``None`` where there are none."""
        parts: list[Tensor] = getattr(self, name)
        if len(parts) > 1:
            widest = parts[0].dtype
            for part in parts:
                widest = torch.promote_types(widest, part.dtype)
            parts[:] = [torch.cat([part.to(widest) for part in parts])]
        return parts[0] if parts else None

    def _everyones(self, name: str, counts: list[int], device: torch.device) -> Tensor:
        """A column of integers of all ranks, in rank order."""
        mine = self._joined(name)
        mine = torch.empty(0, dtype=torch.int64, device=device) if mine is None else mine
        return gather_rows(mine, counts, self.process_group)


def checked_rows(x: Tensor, dtype: torch.dtype | None, before: list[Tensor], who: str) -> Tensor:
    """A copy of (N, D) rows, ready to be stored; on a CPU NaN, infinity and what has no square are found here."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise ValueError(f"{who} must be (N, D), got {_shape(x)}; flatten or pool them first")
    if not x.is_floating_point() or x.dtype not in _DTYPES:
        raise ValueError(f"{who} must be floating point, got {x.dtype}; call .float() on them")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"{who} can be stored in {', '.join(map(str, _DTYPES))}, got store_dtype={dtype}")
    if x.layout is not torch.strided or x.is_meta or x.shape[1] == 0:
        raise ValueError(
            f"{who} must be dense (N, D) numbers with D of at least 1, got {_shape(x)}, {x.layout}, on {x.device}"
        )
    if before and before[0].shape[1] != x.shape[1]:
        raise ValueError(f"{who} had width {before[0].shape[1]} in an earlier update and have width {x.shape[1]} now")
    # a copy: the caller's tensor may be a view of something much bigger, or a buffer about to be written again
    rows = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device).copy_(x.detach())
    if rows.device.type == "cpu" and (row := first_bad(rows)) >= 0:
        raise ValueError(f"{who}: row {row} of this update holds NaN or infinity{_stored(x[row], rows.dtype)}")
    if rows.device.type == "cpu" and rows.dtype is torch.float64 and rows.numel():
        largest = float(rows.abs().max())
        if largest and not 1 / _RANGE < largest < _RANGE:
            raise ValueError(
                f"{who}: the largest magnitude of this update is {largest:.0e}, of which float64 cannot hold "
                "the square; multiply all embeddings by one number, which changes no neighbour and no angle"
            )
    return rows


def checked_column(x: Tensor, rows: int, who: str, boolean: bool = False) -> Tensor:
    """An int64 copy of a column of one integer (or bool) per row."""
    fits = (
        isinstance(x, Tensor) and (x.dtype is torch.bool) == boolean and not (x.is_floating_point() or x.is_complex())
    )
    if not fits or x.ndim != 1:
        kind = "bool" if boolean else "integer"
        raise ValueError(f"{who} must be (N,) of {kind} type, got {_shape(x)}")
    if len(x) != rows:
        raise ValueError(f"{who} has {len(x)} rows, but the embeddings have {rows}")
    if x.is_meta:
        raise ValueError(f"{who} are on the meta device, where tensors hold no numbers")
    return torch.empty(x.shape, dtype=torch.int64, device=x.device).copy_(x)


def same_as_before(given: bool, earlier: list[Tensor], updated: bool, who: str) -> None:
    """An optional column comes with every update or with none."""
    if updated and given != bool(earlier):
        raise ValueError(
            f"{who} must come with every update or with none; earlier updates had {who if earlier else 'none'}"
        )


def refuse_two_labels(sample: Tensor, indices: Tensor, labels: Tensor) -> None:
    """One index stands for one sample."""
    order = sample.argsort()
    i, y = sample[order], labels[order]
    clash = torch.nonzero((i[1:] == i[:-1]) & (y[1:] != y[:-1]))
    if len(clash):
        at = int(clash[0])
        raise ValueError(
            f"index {int(indices[order[at]])} came with labels {int(y[at])} and {int(y[at + 1])}: "
            "an index must stand for one sample (rows of different data sets need different indices)"
        )


def first_bad(rows: Tensor) -> int:
    """The number of the first row with NaN or infinity, or -1."""
    whole = [torch.isfinite(block).all(dim=1) for block in torch.split(rows, 1024)]  # isfinite copies what it reads
    bad = ~torch.cat(whole)
    return int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else -1


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks found they hold: rows (empty where a rank had no update), and who has which optional column."""

    rows: tuple[Tensor, ...]
    counts: list[int]
    optional: tuple[bool, ...]


def agree(rows: tuple[Tensor | None, ...], optional: tuple[bool, ...], device: torch.device, group: Any) -> Agreed:
    """Let ranks agree on widths, dtypes and columns before anything else travels; errors are raised on all of them."""
    held = [x for x in rows if x is not None]
    mine = [len(held[0]) if held else -1, *(int(flag) for flag in optional)]
    for x in rows:  # those on an accelerator have not been looked at before, nor those from a checkpoint
        mine += [0, 0, -1] if x is None else [x.shape[1], _DTYPES.index(x.dtype), first_bad(x)]
    table = gather_rows(torch.tensor([mine], dtype=torch.int64, device=device), group=group).tolist()
    full = [line for line in table if line[0] >= 0]
    if not full:
        raise ValueError("compute() came before any update(): there are no rows to evaluate")
    flags = full[0][1 : 1 + len(optional)]
    if any(line[1 : 1 + len(optional)] != flags for line in full):
        raise ValueError(
            "some ranks were given indices or is_query and others were not; give them on every rank or none"
        )
    agreed = []
    for n, x in enumerate(rows):
        widths, codes, bad = zip(*(line[1 + len(optional) + 3 * n :][:3] for line in full), strict=True)
        if len(set(widths)) > 1:
            raise ValueError(f"embeddings have different widths on different ranks: {sorted(set(widths))}")
        if max(bad) >= 0:
            raise ValueError(f"row {max(bad)} of the embeddings that one rank holds has NaN or infinity")
        dtype = _DTYPES[codes[0]]
        for code in codes:
            dtype = torch.promote_types(dtype, _DTYPES[code])
        agreed.append(torch.empty(0, widths[0], dtype=dtype, device=device) if x is None else x.to(dtype))
    return Agreed(tuple(agreed), [max(line[0], 0) for line in table], tuple(bool(f) for f in flags))


def first_of_each(keys: Tensor) -> Tensor:
    """Marks the first occurrence of every key.

    Example:
        >>> first_of_each(torch.tensor([3, 1, 3, 1, 2])).tolist()
        [True, True, False, False, True]
    """
    _, which = torch.unique(keys, return_inverse=True)
    order = which.argsort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = which[order][1:] != which[order][:-1]
    return torch.zeros_like(new).index_put_((order,), new)


def places_of(keys: Tensor) -> Tensor:
    """The place of every key in their ascending order; equal keys keep their order.

    Example:
        >>> places_of(torch.tensor([30, 10, 20])).tolist()
        [2, 0, 1]
    """
    order = keys.argsort(stable=True)
    return torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=order.device))


def points(rows: Tensor, cosine: bool) -> Tensor:
    """Rows in float64, for the cosine scaled to length 1 and rounded to float32 (float64 rows are not rounded).

    A zero row stays zero.

    Example:
        >>> points(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), cosine=True)[1].tolist()
        [0.0, 0.0]
    """
    x = rows.double()
    if cosine:
        x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.nn.functional.normalize(x, dim=1)
        x = x if rows.dtype is torch.float64 else x.float().double()
    return x


def _shape(x: Any) -> str:
    return f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _stored(row: Tensor, dtype: torch.dtype) -> str:
    return f" once stored in {dtype}" if row.dtype is not dtype and bool(torch.isfinite(row).all()) else ""
