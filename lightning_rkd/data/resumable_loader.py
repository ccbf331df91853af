"""A loader that Lightning can stop and resume in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_rkd.data.samplers.pk import PKBatchSampler


class ResumableLoader(DataLoader[Any]):
    """A loader over a :class:`~lightning_rkd.data.PKBatchSampler` whose position is saved and restored.

    Lightning keeps its ``state_dict``, epoch and position, in checkpoints. Workers start with the first batch, not with
    ``iter()``: a resuming Lightning calls ``iter()`` *before* ``set_epoch``, and workers would fetch batches of another
    epoch.

    Example:
        >>> import torch
        >>> def loader():
        ...     return ResumableLoader(torch.arange(8), batch_sampler=PKBatchSampler([0, 0, 1, 1, 2, 2, 3, 3], 1, 2))
        >>> whole, stopped, resumed = loader(), loader(), loader()
        >>> head = next(iter(stopped))
        >>> resumed.load_state_dict(stopped.state_dict())
        >>> [b.tolist() for b in whole] == [head.tolist(), *(b.tolist() for b in resumed)]
        True
    """

    _at: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.batch_sampler
        if not isinstance(sampler, PKBatchSampler):  # Lightning replaces it for overfit_batches
            yield from super().__iter__()
            return
        epoch, delivered = sampler.epoch, sampler.first_batch
        for batch in super().__iter__():
            delivered += 1
            self._at = (epoch, delivered)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches delivered in it, without those that workers have fetched ahead."""
        sampler = self.batch_sampler
        if not isinstance(sampler, PKBatchSampler):
            return {}
        here = (sampler.epoch, sampler.first_batch)
        epoch, first = self._at if self._at is not None and self._at[0] == sampler.epoch else here
        return {"epoch": epoch, "first_batch": first}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the position at which the next iteration begins."""
        if isinstance(self.batch_sampler, PKBatchSampler) and state:
            self.batch_sampler.load_state_dict(state)
            self._at = None
