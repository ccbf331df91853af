from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_rkd.data import Draw, PKBatchSampler, ResumableLoader

LABELS = [i // 7 for i in range(140)]


class Epochs(Dataset[Any]):
    """A sample is its index and the epoch of the access."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[int, int]:
        assert isinstance(index, Draw)
        return int(index), index.epoch


def loader(workers: int) -> ResumableLoader:
    sampler = PKBatchSampler(LABELS, 4, 3, seed=3)
    return ResumableLoader(Epochs(), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)


def listed(batches: Any) -> list[list[list[int]]]:
    return [[part.tolist() for part in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_counts_what_was_delivered_not_what_workers_fetched(workers: int) -> None:
    stopped, resumed = loader(workers), loader(0)
    stopped.batch_sampler.set_epoch(4)  # type: ignore[union-attr]
    assert stopped.state_dict() == {"epoch": 4, "first_batch": 0}
    run = iter(stopped)
    head = listed(next(run) for _ in range(3))
    assert stopped.state_dict() == {"epoch": 4, "first_batch": 3}
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == {"epoch": 4, "first_batch": 3}
    resumed.batch_sampler.set_epoch(4)  # type: ignore[union-attr]
    tail = listed(resumed)
    assert resumed.state_dict() == {"epoch": 4, "first_batch": 11}
    assert listed(run) == tail
    assert {epoch for batch in head + tail for epoch in batch[1]} == {4}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_set_after_iter_still_holds(workers: int) -> None:
    late = loader(workers)
    run = iter(late)
    late.batch_sampler.set_epoch(5)  # type: ignore[union-attr]
    assert {epoch for batch in listed(run) for epoch in batch[1]} == {5}
    late.batch_sampler.set_epoch(6)  # type: ignore[union-attr]
    assert late.state_dict() == {"epoch": 6, "first_batch": 0}
    assert {epoch for batch in listed(late) for epoch in batch[1]} == {6}


def test_a_foreign_batch_sampler_is_simply_iterated() -> None:
    plain = ResumableLoader(torch.arange(6), batch_size=4)
    assert [b.tolist() for b in plain] == [b.tolist() for b in DataLoader(torch.arange(6), batch_size=4)]
    assert plain.state_dict() == {}
    plain.load_state_dict({"epoch": 1, "first_batch": 1})
    assert len(list(plain)) == 2
