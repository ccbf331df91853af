"""Batches of loaders become a ``Batch``, or an error that says why not."""

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch

from lightning_rkd.utils.types import Batch, unpack

X, Y, ROWS = torch.ones(2, 3), torch.arange(2), torch.tensor([7, 9])
Named = namedtuple("Named", "x y i")


@pytest.mark.parametrize(
    ("batch", "keys", "expected"),
    [
        (X, {}, (X, None, None)),
        ([X], {}, (X, None, None)),
        ((X, Y), {}, (X, Y, None)),
        (Named(X, Y, ROWS), {"indices": 2}, (X, Y, ROWS)),
        ((ROWS, Y, X), {"inputs": 2, "labels": 1, "indices": 0}, (X, Y, ROWS)),
        ({"x": X, "y": Y, "i": ROWS}, {"inputs": "x"}, (X, None, None)),
        ({"x": X, "y": Y, "i": ROWS}, {"inputs": "x", "labels": "y", "indices": "i"}, (X, Y, ROWS)),
        (UserDict({"x": X, "y": Y}), {"inputs": "x", "labels": "y"}, (X, Y, None)),
    ],
)
def test_inputs_labels_and_indices_are_found(batch: Any, keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = unpack(batch, **keys)
    assert (found.inputs is expected[0], found.labels is expected[1], found.indices is expected[2]) == (True,) * 3


def test_a_list_of_keys_gives_the_networks_keywords() -> None:
    found = unpack({"ids": X, "mask": Y, "y": ROWS}, inputs=["ids", "mask"], labels="y")
    assert list(found.inputs) == ["ids", "mask"]
    assert found.labels is ROWS


def test_a_batch_is_taken_as_it_is() -> None:
    batch = Batch(X, teacher_inputs=Y)
    assert unpack(batch) is batch


@pytest.mark.parametrize(
    ("batch", "keys", "error", "message"),
    [
        ({"x": X, 2: Y}, {}, TypeError, "a mapping with the keys"),
        ({"x": X}, {"inputs": "image"}, KeyError, r"inputs='image' is not in the batch, which has \['x'\]"),
        ((X, Y), {"indices": 2}, KeyError, "indices=2 is not in the batch, which has 2 entries"),
        ((X, Y), {"labels": "y"}, KeyError, "labels='y' is not in the batch, which has 2 entries"),
        ("words", {}, TypeError, "a batch is a tensor, a sequence or a mapping, got str"),
        (3, {}, TypeError, "got int"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unpack(batch, **keys)
