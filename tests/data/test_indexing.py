from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset

from lightning_rkd.data import IndexedBatch, PKBatchSampler, ResumableLoader, with_indices
from lightning_rkd.data.indexing import to_batch
from lightning_rkd.data.loaders import number_batches
from lightning_rkd.utils.types import Batch, unpack


class Numbers(torch.utils.data.Dataset[Any]):
    """Sample i is (i, i squared)."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index * index


class Whole(Numbers):
    """Fetches batches already collated."""

    def __getitems__(self, indices: list[int]) -> Any:
        return torch.tensor(indices), torch.tensor(indices) ** 2


def keep(samples: Any) -> Any:
    return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_subset_of_a_subset_names_the_rows_of_its_root(workers: int) -> None:
    data = Subset(Subset(Numbers(), list(range(99, 39, -1))), torch.randperm(60)[:37].tolist())
    generator = torch.Generator().manual_seed(3)
    loader = with_indices(DataLoader(data, 5, shuffle=True, num_workers=workers, generator=generator))
    batches = list(loader)
    assert [len(b.indices) for b in batches] == [5] * 7 + [2]
    for batch in batches:
        assert isinstance(batch, IndexedBatch)
        assert batch.indices.dtype == torch.int64
        assert torch.equal(batch.batch[0], batch.indices)
        assert torch.equal(batch.batch[1], batch.indices**2)
    seen = torch.cat([b.indices for b in batches]).tolist()
    assert len(set(seen)) == 37
    assert seen != sorted(seen)


def shuffled() -> RandomSampler:
    return RandomSampler(Numbers(), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(), 8, sampler=shuffled(), drop_last=True),
        lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(shuffled(), 3, True)),
        lambda: DataLoader(Subset(Whole(), range(50, 60)), 4, collate_fn=keep),
        lambda: ResumableLoader(Numbers(), batch_sampler=PKBatchSampler([i // 10 for i in range(100)], 2, 3)),
    ],
    ids=["batch size", "batch sampler", "whole batches", "resumable"],
)
def test_the_batches_are_those_of_the_original_loader(make: Any) -> None:
    given, numbered = make(), with_indices(make())
    assert type(numbered) is type(given)
    for (x, y), indexed in zip(given, numbered, strict=True):
        assert torch.equal(x, indexed.batch[0])
        assert torch.equal(x, indexed.indices)
        assert torch.equal(y, indexed.batch[1])


def test_every_setting_of_the_loader_is_kept() -> None:
    settings: dict[str, Any] = {
        "num_workers": 1, "collate_fn": keep, "timeout": 7, "worker_init_fn": keep, "persistent_workers": True,
        "prefetch_factor": 3, "multiprocessing_context": "spawn", "generator": torch.Generator(), "in_order": False,
    }  # fmt: skip
    original = DataLoader(Numbers(), 6, drop_last=True, sampler=RandomSampler(Numbers()), **settings)
    rebuilt = with_indices(original)
    for name in {*settings, "batch_size", "drop_last", "sampler", "pin_memory"} - {"collate_fn"}:
        assert getattr(rebuilt, name) is getattr(original, name) or getattr(rebuilt, name) == getattr(original, name)
    assert rebuilt.collate_fn.collate is keep  # type: ignore[attr-defined]
    assert with_indices(rebuilt) is rebuilt


def test_concatenations_are_roots() -> None:
    data = ConcatDataset([Subset(Numbers(), [7, 8]), Numbers()])
    first = next(iter(with_indices(DataLoader(data, 4))))
    assert first.indices.tolist() == [0, 1, 2, 3]
    assert first.batch[0].tolist() == [7, 8, 0, 1]


def test_negative_indices_count_from_the_end() -> None:
    data = Subset(Numbers(), [5, -1])
    loader = with_indices(DataLoader(data, batch_sampler=[[-1, -2]]))
    assert next(iter(loader)).indices.tolist() == [99, 5]


def test_loaders_in_a_combined_loader_are_numbered_and_its_mode_stays() -> None:
    given = CombinedLoader({"a": DataLoader(Numbers(), 20), "b": [DataLoader(Numbers(), 30)]}, "min_size")
    batches = [batch for batch, *_ in number_batches(given)]
    assert [len(batch["a"].indices) for batch in batches] == [20] * 4
    assert [len(batch["b"][0].indices) for batch in batches] == [30, 30, 30, 10]
    assert not isinstance(next(iter(given))[0]["a"], IndexedBatch)


def test_what_has_no_rows_is_refused_with_the_cure() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    class Own(DataLoader[Any]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)

        def __iter__(self) -> Any:
            return super().__iter__()

    with pytest.raises(TypeError, match="Stream is iterable"):
        with_indices(DataLoader(Stream(), 2))
    with pytest.raises(TypeError, match="batch_size=None"):
        with_indices(DataLoader(Numbers(), batch_size=None))
    with pytest.raises(TypeError, match="cannot rebuild a Own"):
        with_indices(Own(Numbers()))
    with pytest.raises(TypeError, match="torch DataLoader, got list"):
        with_indices([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an integer"):
        next(iter(with_indices(DataLoader(Numbers(), batch_sampler=[["a"]]))))


def test_indices_stay_whole_numbers_when_the_batch_is_cast() -> None:
    cast = IndexedBatch(torch.ones(2), torch.tensor([2**40])).to(torch.float16)
    assert cast.batch.dtype == torch.float16
    assert cast.indices.tolist() == [2**40], "infinite in half precision"


def test_an_unpacked_batch_has_the_loaders_indices_or_its_own() -> None:
    indexed = IndexedBatch((torch.ones(2, 3), torch.zeros(2), torch.tensor([8, 9])), torch.tensor([4, 7]))
    assert to_batch(indexed, unpack).indices.tolist() == [4, 7]
    assert to_batch(indexed, lambda batch: unpack(batch, indices=2)).indices.tolist() == [8, 9]
    assert to_batch(indexed.batch, unpack).indices is None
    own = Batch(torch.ones(2, 3))
    assert to_batch(IndexedBatch(own, torch.tensor([4, 7])), unpack).indices.tolist() == [4, 7]
    assert own.indices is None, "the loader's own batch is left alone"


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    IndexedBatch((torch.ones(2), [torch.ones(3)]), torch.tensor([0])).pin_memory()
    assert sorted(len(torch.ones(s)) for s in pinned) == [1, 2, 3]
