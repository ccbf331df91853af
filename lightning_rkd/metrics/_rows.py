"""Base of the metrics over rows of embeddings: states that stay on their rank, checks, and the exchange of integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.utils.distributed import ALONE, gather_rows, rank_and_size

_RANGE = 1e150  # squares of numbers within it and of their inverses are in the range of float64
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OPTIONAL = ("indices", "is_query")


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of all ranks, each once: rows stay on their rank, integers are known to all."""

    rows: tuple[Tensor, ...]  # local, one tensor per state
    columns: dict[str, Tensor]  # of all samples in rank order
    keys: Tensor  # index of every sample, or its number where there are no indices; decides order and ties
    first: int  # number of the first local sample in rank order

    @property
    def own(self) -> slice:
        """The local samples among those of all ranks."""
        return slice(self.first, self.first + len(self.rows[0]))


class RowMetric(Metric):
    """A metric whose states are lists of floating rows, and of integers that no change of precision touches.

    torchmetrics does not synchronise the states: ``compute`` exchanges only integers and blocks of rows.
    """

    full_state_update: bool = False
    is_differentiable: bool = False
    _floats: tuple[str, ...]
    _integers: ClassVar[tuple[str, ...]]

    def __init__(self, distance: str, store_dtype: torch.dtype | None = None, value: str | None = None) -> None:
        super().__init__(sync_on_compute=False)
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f'distance must be "euclidean" or "cosine", got {distance!r}')
        if store_dtype is not None and not store_dtype.is_floating_point:
            raise ValueError(f"store_dtype must be a floating dtype, got {store_dtype}")
        if value is not None and value not in self.names:
            raise ValueError(f"value must be one of {', '.join(self.names)}, got {value!r}")
        self.distance, self.store_dtype, self.value = distance, store_dtype, value
        for name in (*self._floats, *self._integers):
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update, and return the value of these rows alone, on this process; NaN if they are too few for one.

        The mean over batches is not the value of an epoch: use :meth:`compute`, or log the metric itself.
        """
        held = {name: [*getattr(self, name)] for name in (*self._floats, *self._integers)}
        vars(self).update(held)  # lists of its own: a MetricCollection lets metrics share them
        self.update(*args, **kwargs)
        kept = {**held, "process_group": self.process_group}
        try:
            vars(self).update({name: parts[-1:] for name, parts in held.items()}, process_group=ALONE)
            batch = self._values()
        except ValueError:
            batch = torch.full((len(self.names),), torch.nan, device=self.device)
        finally:
            vars(self).update(kept)
        self._forward_cache = self._select(batch)  # read by Lightning
        return self._forward_cache

    def compute(self) -> Any:
        """Evaluate the rows of all processes; every process must call it."""
        return self._select(self._values())

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot values, as every metric of torchmetrics does.

        Args:
            val: Result of :meth:`compute` or ``forward``, or a list of them; ``None`` computes it.
            ax: Matplotlib axes; ``None`` makes a figure.

        Returns:
            Figure and axes.

        Example:
            >>> from lightning_rkd.metrics import EmbeddingRetrieval
            >>> metric = EmbeddingRetrieval()
            >>> values = [metric(torch.rand(8, 2), torch.arange(8) // 2) for _ in range(3)]
            >>> figure, axes = metric.plot(values)
            >>> axes.get_legend_handles_labels()[1]
            ['recall_at_1', 'map_at_r', 'r_precision']
        """
        return self._plot(val, ax)

    def _values(self) -> Tensor:
        held = getattr(self, self._floats[0])
        device = held[0].device if held else self.device
        with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._evaluate(device).float()

    def _select(self, values: Tensor) -> Any:
        """All values by name, or the chosen one."""
        named = dict(zip(self.names, values, strict=True))
        return named if self.value is None else named[self.value]

    def _evaluate(self, device: torch.device) -> Tensor:
        """Values in the order of their names."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> RowMetric:
        super()._apply(fn, exclude_state=(*exclude_state, *self._integers))
        for name in self._integers:  # set_dtype would round labels to the new precision; devices still follow
            setattr(self, name, [part.to(fn(part).device) for part in getattr(self, name)])
        return self

    def _add(self, rows: Mapping[str, Tensor], **columns: Tensor | None) -> None:
        """Check an update as a whole, then keep copies of its rows and columns."""
        checked = {}
        for name, x in rows.items():
            who = f"{name} embeddings" if name in ("student", "teacher") else name
            checked[name] = check_rows(x, self.store_dtype, getattr(self, name), who)
        (first, n), *others = ((name, len(x)) for name, x in checked.items())
        for name, count in others:
            if count != n:
                raise ValueError(f"{first} has {n} rows, but {name} has {count}")
        for name, column in columns.items():
            earlier = getattr(self, name)
            if getattr(self, first) and (column is not None) != bool(earlier):
                had = name if earlier else "none"
                raise ValueError(f"{name} must come with every update or with none; earlier updates had {had}")
            if column is not None or name not in _OPTIONAL:
                checked[name] = check_column(column, n, name)
        for name, x in checked.items():
            getattr(self, name).append(x)

    def _join(self, name: str) -> Tensor | None:
        """The rows of a state as one tensor, which replaces the parts; ``None`` where there are none."""
        parts: list[Tensor] = getattr(self, name)
        if len(parts) > 1:
            widest = parts[0].dtype
            for part in parts:
                widest = torch.promote_types(widest, part.dtype)
            parts[:] = [torch.cat([part.to(widest) for part in parts])]
        return parts[0] if parts else None

    def _exchange(self, device: torch.device) -> Samples:
        """Gather the integers of all ranks, and drop samples whose index came before."""
        group, empty = self.process_group, torch.empty(0, dtype=torch.int64, device=device)
        parts = tuple(self._join(name) for name in self._floats)
        rows, counts, given = agree(parts, tuple(bool(getattr(self, name)) for name in self._integers), device, group)
        joined = {name: self._join(name) for name, there in zip(self._integers, given, strict=True) if there}
        columns = {name: gather_rows(empty if x is None else x, counts, group) for name, x in joined.items()}
        first = sum(counts[: rank_and_size(group)[0]])
        samples = Samples(rows, columns, columns.get("indices", torch.arange(sum(counts), device=device)), first)
        if "indices" not in columns:
            return samples
        sample = samples.keys
        if "is_query" in columns:  # one sample may be both a query and in the gallery
            sample = 2 * sample + columns["is_query"]
        if "labels" in columns:
            refuse_two_labels(samples.keys, columns["labels"])
        kept = first_of_each(sample)
        if bool(kept.all()):
            return samples
        return Samples(
            tuple(x[kept[samples.own]] for x in rows),
            {name: column[kept] for name, column in columns.items()},
            samples.keys[kept],
            int(kept[:first].sum()),
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, without TF32 or bfloat16, whatever training allows."""
    candidates: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    holders = [c for c in candidates if hasattr(c, "fp32_precision")]  # torch 2.9 and later; before, one global word
    words = [holder.fp32_precision for holder in holders]
    word = "" if holders else torch.get_float32_matmul_precision()
    try:
        for holder in holders:
            holder.fp32_precision = "ieee"
        if word:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for holder, before in zip(holders, words, strict=True):
            holder.fp32_precision = before
        if word:
            torch.set_float32_matmul_precision(word)


def check_rows(x: Tensor, dtype: torch.dtype | None, before: list[Tensor], who: str) -> Tensor:
    """A copy of (N, D) rows to store; on a CPU this finds NaN, infinity and numbers without a square."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise ValueError(f"{who} must be (N, D), got {_describe(x)}; flatten or pool them first")
    if not x.is_floating_point() or x.dtype not in _DTYPES:
        raise ValueError(f"{who} must be floating point, got {x.dtype}; call .float() on them")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"{who} can be stored in {', '.join(map(str, _DTYPES))}, got store_dtype={dtype}")
    if x.layout is not torch.strided or x.is_meta or x.shape[1] == 0:
        raise ValueError(
            f"{who} must be dense (N, D) numbers with D of at least 1, got {_describe(x)}, {x.layout}, on {x.device}"
        )
    if before and before[0].shape[1] != x.shape[1]:
        raise ValueError(f"{who} had width {before[0].shape[1]} in an earlier update and have width {x.shape[1]} now")
    # a copy: the caller's tensor may be a view of something much bigger, or a buffer about to be written again
    rows = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device).copy_(x.detach())
    if rows.device.type != "cpu" or not rows.numel():
        return rows
    if (bad := first_bad_row(rows)) >= 0:
        stored = f" once stored in {rows.dtype}" if x.dtype is not rows.dtype and bool(x[bad].isfinite().all()) else ""
        raise ValueError(f"{who}: row {bad} of this update holds NaN or infinity{stored}")
    largest = float(rows.abs().max()) if rows.dtype is torch.float64 else 0.0
    if largest and not 1 / _RANGE < largest < _RANGE:
        raise ValueError(
            f"{who}: the largest magnitude of this update is {largest:.0e}, of which float64 cannot hold "
            "the square; multiply all embeddings by one number, which changes no neighbour and no angle"
        )
    return rows


def check_column(x: Any, rows: int, who: str) -> Tensor:
    """An int64 copy of a column of one integer per row, or one bool for ``is_query``."""
    kind = "bool" if who == "is_query" else "integer"
    if (
        not isinstance(x, Tensor)
        or x.ndim != 1
        or (x.dtype is torch.bool) != (kind == "bool")
        or x.is_floating_point()
        or x.is_complex()
    ):
        raise ValueError(f"{who} must be (N,) of {kind} type, got {_describe(x)}")
    if len(x) != rows:
        raise ValueError(f"{who} has {len(x)} rows, but the embeddings have {rows}")
    if x.is_meta:
        raise ValueError(f"{who} are on the meta device, where tensors hold no numbers")
    return torch.empty(x.shape, dtype=torch.int64, device=x.device).copy_(x)


def refuse_two_labels(indices: Tensor, labels: Tensor) -> None:
    """Raise where one index came with two labels."""
    order = indices.argsort()
    i, y = indices[order], labels[order]
    clash = torch.nonzero((i[1:] == i[:-1]) & (y[1:] != y[:-1]))
    if len(clash):
        at = int(clash[0])
        raise ValueError(
            f"index {int(i[at])} came with labels {int(y[at])} and {int(y[at + 1])}: "
            "an index must stand for one sample (rows of different data sets need different indices)"
        )


def first_bad_row(rows: Tensor) -> int:
    """Number of the first row with NaN or infinity, or -1."""
    bad = ~torch.cat([torch.isfinite(block).all(dim=1) for block in torch.split(rows, 1024)])  # isfinite copies
    return int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else -1


def agree(
    rows: tuple[Tensor | None, ...], given: tuple[bool, ...], device: torch.device, group: Any
) -> tuple[tuple[Tensor, ...], list[int], tuple[bool, ...]]:
    """Compare widths, dtypes and columns of all ranks before any exchange, so that errors are raised on all of them.

    Returns the local rows in a common dtype, the number of rows of every rank, and the columns that there are.
    """
    held = [x for x in rows if x is not None]
    line = [len(held[0]) if held else -1, *map(int, given)]
    for x in rows:  # rows from an accelerator or a checkpoint have not been checked before
        line += [0, 0, -1] if x is None else [x.shape[1], _DTYPES.index(x.dtype), first_bad_row(x)]
    table = gather_rows(torch.tensor([line], dtype=torch.int64, device=device), group=group).tolist()
    full = [line for line in table if line[0] >= 0]
    if not full:
        raise ValueError("compute() came before any update(): there are no rows to evaluate")
    flags = full[0][1 : 1 + len(given)]
    if any(line[1 : 1 + len(given)] != flags for line in full):
        raise ValueError(
            "some ranks were given indices or is_query and others were not; give them on every rank or none"
        )
    common = []
    for n, x in enumerate(rows):
        widths, codes, bad = zip(*(line[1 + len(given) + 3 * n :][:3] for line in full), strict=True)
        if len(set(widths)) > 1:
            raise ValueError(f"embeddings have different widths on different ranks: {sorted(set(widths))}")
        if max(bad) >= 0:
            raise ValueError(f"row {max(bad)} of the embeddings that one rank holds has NaN or infinity")
        dtype = _DTYPES[codes[0]]
        for code in codes:
            dtype = torch.promote_types(dtype, _DTYPES[code])
        common.append(torch.empty(0, widths[0], dtype=dtype, device=device) if x is None else x.to(dtype))
    return tuple(common), [max(line[0], 0) for line in table], tuple(map(bool, flags))


def first_of_each(keys: Tensor) -> Tensor:
    """Mask of the first occurrence of every key."""
    _, which = torch.unique(keys, return_inverse=True)
    order = which.argsort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = which[order][1:] != which[order][:-1]
    return torch.zeros_like(new).index_put_((order,), new)


def rank_keys(keys: Tensor) -> Tensor:
    """Place of every key in ascending order; equal keys keep their order."""
    order = keys.argsort(stable=True)
    return torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=order.device))


def find_keys(keys: Tensor, wanted: Tensor) -> Tensor:
    """Position of every wanted key among the keys, or -1."""
    if not len(keys):
        return torch.full_like(wanted, -1)
    order = keys.argsort()
    at = order[torch.searchsorted(keys[order], wanted).clamp(max=len(keys) - 1)]
    return torch.where(keys[at] == wanted, at, -1)


def as_points(rows: Tensor, cosine: bool) -> Tensor:
    """Rows in float64; for the cosine unit rows, rounded to float32 unless they come in float64; zero rows stay."""
    x = rows.double()
    if cosine:
        x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.nn.functional.normalize(x, dim=1)
        x = x if rows.dtype is torch.float64 else x.float().double()
    return x


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (..., n, m) from differences: each depends on its two rows alone, bit for bit."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _describe(x: Any) -> str:
    return f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
