"""Ranges of a loop on several threads."""

import threading

import pytest
import torch

from lightning_rkd.functional._kernels.threads import in_ranges, shares


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_ranges_cover_every_item_once(count, parts):
    seen: list[tuple[int, int, int]] = []
    in_ranges(lambda *limits: seen.append(limits), count, parts)
    assert [part for part, _, _ in sorted(seen)] == list(range(parts))
    assert [item for _, start, stop in sorted(seen) for item in range(start, stop)] == list(range(count))


def test_ranges_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=30)
    in_ranges(lambda *limits: barrier.wait(), 3, 3)


def test_an_error_in_any_range_is_raised_when_all_have_ended():
    ended: list[int] = []

    def work(part: int, start: int, stop: int) -> None:
        ended.append(part)
        if part == 1:
            raise ValueError("range 1")

    with pytest.raises(ValueError, match="range 1"):
        in_ranges(work, 3, 3)
    assert sorted(ended) == [0, 1, 2]


def test_shares_follow_the_number_of_threads_and_none_is_too_small(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [shares(count, smallest=10) for count in (0, 5, 19, 20, 39, 40, 1000)] == [1, 1, 1, 2, 3, 4, 4]
