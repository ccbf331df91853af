"""Data modules whose parts hold the same classes."""

from typing import Any

import pytest
import torch

from lightning_rkd.data.datamodules.splits import split_samples
from tests.data.datamodules.test_base import Squares


def data(**settings: Any) -> Squares:
    module = Squares(**{"classes_per_batch": 4, "samples_per_class": 3, "split_by": "samples", **settings})
    module.setup()
    return module


def test_all_parts_hold_all_classes_and_share_no_row() -> None:
    module = data()
    rows = [list(part.indices) for part in (module.train_set, module.val_set, module.test_set)]
    assert sorted(row for part in rows for row in part) == list(range(120))
    assert [set(module.root.labels[torch.tensor(part)].tolist()) for part in rows] == [set(range(20))] * 3
    assert module.num_train_classes == 20
    assert module.class_names[3] == "c3"


def test_batches_are_all_rows_in_random_order_without_regard_to_classes() -> None:
    module = data(batches_per_epoch=None)
    batches = [y for _, y in module.train_dataloader()]
    assert [len(y) for y in batches] == [12] * (len(module.train_set) // 12)
    assert len({tuple(sorted(y.tolist())) for y in batches}) > 1
    assert any(len(set(y.tolist())) > 4 for y in batches), "not four classes with three samples each"


def test_no_row_comes_twice_in_an_epoch() -> None:
    sampler = data().train_dataloader().batch_sampler
    drawn = [int(i) for batch in sampler for i in batch]
    assert len(drawn) == len(set(drawn))


def test_the_test_rows_do_not_depend_on_the_validation_part() -> None:
    labels = torch.arange(10).repeat(20).tolist()
    parts = [split_samples(labels, validation, 0.2, seed=3)[2] for validation in (0.1, 0.4)]
    assert parts[0] == parts[1]
    assert split_samples(labels, 0.1, 0.2, seed=4)[2] != parts[0]


def test_classes_that_are_too_small_and_parts_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 samples, too few"):
        split_samples([0, 0, 0, 1, 1], 0.2, 0.2)
    with pytest.raises(ValueError, match="below 1 together"):
        split_samples([0] * 9, 0.5, 0.5)
    with pytest.raises(ValueError, match="split_by must be 'classes' or 'samples'"):
        Squares(split_by="rows")  # type: ignore[arg-type]


def test_batches_larger_than_the_training_set_are_refused() -> None:
    with pytest.raises(ValueError, match=r"= 20 x 50 on 1 device\(s\) need at least 1000 training samples, and there "):
        data(classes_per_batch=20, samples_per_class=50).train_dataloader()
