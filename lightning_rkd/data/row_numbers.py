"""Data set rows of evaluation batches on several ranks."""

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_rkd.data.indexing import find_root_row
from lightning_rkd.utils.types import Batch


class RowNumbers:
    """Row numbers of one pass over an evaluation loader on one of several ranks.

    A distributed sampler repeats rows to fill its last batch; row numbers allow counting them once.
    """

    def __init__(self, loader: Any, ranks: int) -> None:
        self.ranks, self.position = ranks, 0
        self.order = _read_order(loader) if ranks > 1 else None

    def number(self, batch: Batch, rows: int, device: torch.device, *, needed: bool) -> None:
        """Set the indices of the next batch if it has none; an error if a metric needs them and they are unknown."""
        if batch.indices is None and self.order is not None:
            own = self.order[self.position : self.position + rows]
            batch.indices = torch.tensor(own, dtype=torch.int64, device=device)
        self.position += rows
        if batch.indices is None and self.ranks > 1 and needed:
            raise ValueError(
                f"on {self.ranks} devices the rows that a distributed sampler repeats must be known to be counted "
                "once, and this loader's sampler does not tell them: wrap it, with_indices(loader), or name the entry "
                "of the batch that holds them, indices=..."
            )


def _read_order(loader: Any) -> list[int] | None:
    """Data set rows in the order of this rank's loader, if its sampler can be read without changing its state."""
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    # no subclasses: Lightning wraps other samplers in one, and reading a random one changes its next order
    if type(loader.sampler) in (DistributedSampler, SequentialSampler):
        return [find_root_row(loader.dataset, row) for row in loader.sampler]
    return None
