import copy
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rkd.data import Draw, PKBatchSampler

LABELS = [i // 7 for i in range(140)]  # 20 classes x 7


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Labels with classes of any sizes in any order; P, K and the number of devices."""
    size, p = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 9), min_size=size * p, max_size=size * p + 8))
    labels = draw(st.permutations([10 * c for c, n in enumerate(counts) for _ in range(n)]))
    return list(labels), p, draw(st.integers(1, 4)), size


@settings(max_examples=80, deadline=None)
@given(plans(), st.integers(0, 2**40), st.integers(0, 50))
def test_every_batch_holds_p_classes_with_k_samples_each(plan: Any, seed: int, epoch: int) -> None:
    labels, p, k, size = plan
    sampler = PKBatchSampler(labels, p, k, seed, rank=size - 1, size=size)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == max(1, len(labels) // (p * k * size))
    sizes = Counter(labels)
    for batch in batches:
        classes = [labels[i] for i in batch]
        assert Counter(classes) == dict.fromkeys(dict.fromkeys(classes), k)
        assert len(set(classes)) == p
        # repeats only where a class is too small, and then as evenly as possible
        repeats = Counter(int(i) for i in batch)
        assert all(n <= -(-k // sizes[labels[i]]) for i, n in repeats.items())


@settings(max_examples=80, deadline=None)
@given(plans(), st.integers(0, 5), st.integers(1, 6))
def test_w_devices_see_what_one_device_with_w_times_the_classes_sees(plan: Any, epoch: int, steps: int) -> None:
    labels, p, k, size = plan
    one = PKBatchSampler(labels, p * size, k, 5, steps, rank=0, size=1)
    many = [PKBatchSampler(labels, p, k, 5, steps, rank=r, size=size) for r in range(size)]
    for sampler in (one, *many):
        sampler.set_epoch(epoch)
    for whole, *parts in zip(one, *many, strict=True):
        assert Counter(whole) == Counter(i for part in parts for i in part)
        classes = [labels[i] for part in parts for i in set(part)]
        assert len({labels[i] for i in whole}) == p * size == len(set(classes))


def test_w_devices_run_as_many_steps_as_one_device_by_default() -> None:
    one = PKBatchSampler(LABELS, 4, 3, rank=0, size=1)
    many = [PKBatchSampler(LABELS, 2, 3, rank=r, size=2) for r in range(2)]
    assert [len(s) for s in (one, *many)] == [11, 11, 11]


def _batches(rank: int) -> list[list[int]]:
    return [list(map(int, batch)) for batch in PKBatchSampler(LABELS, 3, 2, 9)]


def test_ranks_are_read_from_the_process_group(ranks: Any) -> None:
    parts = ranks.run(_batches)
    for whole, *pair in zip(PKBatchSampler(LABELS, 6, 2, 9), *parts, strict=True):
        assert whole == pair[0] + pair[1]


def test_epochs_and_seeds_differ_and_the_same_ones_agree() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = PKBatchSampler(LABELS, 4, 3, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_all_classes_come_before_any_comes_again_and_so_do_samples() -> None:
    sampler = PKBatchSampler(LABELS, 3, 2, batches_per_epoch=70)
    batches = list(sampler)
    classes = [LABELS[i] for batch in batches for i in batch[::2]]
    for start in range(0, 200, 20):
        # hands of three do not divide decks of twenty, so the seam may move by a hand
        counts = Counter(classes[: start + 20])
        assert max(counts.values()) - min(counts[c] for c in range(20)) <= 1
    times = Counter(i for batch in batches for i in batch)
    for label in range(20):
        drawn = [times[i] for i in range(140) if LABELS[i] == label]
        assert max(drawn) - min(drawn) <= 1


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(PKBatchSampler(LABELS, 4, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_a_restored_position_continues_the_epoch_and_only_that_one(stop: int) -> None:
    stopped, resumed = PKBatchSampler(LABELS, 4, 3, 2), PKBatchSampler(LABELS, 4, 3, 2)
    stopped.set_epoch(6)
    whole = list(stopped)
    cut = iter(stopped)
    head = [next(cut) for _ in range(stop)]
    state = stopped.state_dict() if stop else {"epoch": 6, "first_batch": 0}
    assert state == {"epoch": 6, "first_batch": stop}
    resumed.load_state_dict(state)
    resumed.set_epoch(6)
    assert resumed.first_batch == stop
    assert len(resumed) == len(whole)
    assert head + list(resumed) == whole
    assert list(resumed) == whole
    resumed.load_state_dict(state)
    resumed.set_epoch(7)
    assert len(list(resumed)) == 11


def test_a_position_saved_right_after_it_was_restored_is_the_same() -> None:
    sampler, state = PKBatchSampler(LABELS, 4, 3, 2), {"epoch": 6, "first_batch": 4}
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    sampler.set_epoch(6)
    assert sampler.state_dict() == state
    sampler.set_epoch(7)
    assert sampler.state_dict() == {"epoch": 7, "first_batch": 0}


def test_its_sampler_is_itself_because_lightning_sets_the_epoch_there() -> None:
    from lightning.fabric.utilities.data import _set_sampler_epoch

    sampler = PKBatchSampler(LABELS, 4, 3)
    _set_sampler_epoch(torch.utils.data.DataLoader(LABELS, batch_sampler=sampler), 5)  # type: ignore[arg-type]
    assert sampler.sampler is sampler
    assert sampler.epoch == 5


def test_labels_may_be_a_tensor_or_an_array() -> None:
    expected = list(PKBatchSampler(LABELS, 4, 3))
    assert list(PKBatchSampler(torch.tensor(LABELS), 4, 3)) == expected
    assert list(PKBatchSampler(np.array(LABELS, dtype=np.uint8), 4, 3)) == expected


def test_draws_are_integers_that_carry_their_epoch_through_pickle_and_copy() -> None:
    sampler = PKBatchSampler(LABELS, 4, 3)
    sampler.set_epoch(9)
    draw = next(iter(sampler))[0]
    for same in (draw, pickle.loads(pickle.dumps(draw)), copy.deepcopy(draw)):
        assert isinstance(same, Draw)
        assert same == int(draw)
        assert same.epoch == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "labels must be N > 0 integers"),
        ({"labels": [0.5, 1.0]}, "labels must be N > 0 integers"),
        ({"labels": torch.zeros(3, 2, dtype=torch.int64)}, r"of shape \(3, 2\)"),
        ({"classes_per_batch": 21}, "at least 21 classes, and the labels hold 20"),
        ({"classes_per_batch": 11, "rank": 0, "size": 2}, r"on 2 device\(s\) needs at least 22 classes"),
        ({"classes_per_batch": 0}, "classes_per_batch must be at least 1, got 0"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"rank": 1}, "both rank and size"),
        ({"rank": 2, "size": 2}, r"rank must be in \[0, 2\)"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PKBatchSampler(**{"labels": LABELS, "classes_per_batch": 4, "samples_per_class": 3, **arguments})
