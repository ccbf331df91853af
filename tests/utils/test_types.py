"""Batches of loaders become a ``Batch``, or an error that says why not."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_rkd.utils.types import Batch, select, unpack

X, Y, ROWS = torch.ones(2, 3), torch.arange(2), torch.tensor([7, 9])
Named = namedtuple("Named", "x y i")


@dataclass
class Record:
    x: torch.Tensor


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


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ((Y, X), {"inputs": 1}),
        ((Y, X), {"inputs": [0, 1]}),
        ((X, ROWS), {"indices": 1}),
        ((X, {"image": X}), {"teacher_inputs": "1.image"}),
        (Named(ROWS, X, Y), {"inputs": "y"}),
    ],
)
def test_an_entry_that_is_named_otherwise_is_not_taken_for_labels(batch: Any, keys: dict[str, Any]) -> None:
    """The second entry was: labels of (labels, images) with ``inputs=1`` were the images."""
    assert unpack(batch, **keys).labels is None


def test_an_entry_whose_name_has_a_dot_comes_before_a_path() -> None:
    assert select({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert select({"a": {"b": 2}}, "a.b") == 2


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
        ({"x": X, 2: Y}, {}, TypeError, r"a dict, has the entries \['x', 2\]: say which are the inputs"),
        (Record(X), {}, TypeError, r"a Record, has the entries \['x'\]: say which are the inputs, inputs='...'"),
        ({"x": X}, {"inputs": "image"}, KeyError, r"inputs='image' is .*: there is no 'image' .* entries \['x'\]"),
        ({"x": {"y": X}}, {"inputs": "x.z"}, KeyError, r"inputs='x.z' is .*: there is no 'z' .* entries \['y'\]"),
        ({"x": X}, {"inputs": "x.z"}, KeyError, "there is no 'z' in the Tensor with no entries"),
        ((X, Y), {"inputs": [0, 2]}, KeyError, r"inputs=\[0, 2\] is .*: there is no 2 in the tuple with 2 entries"),
        ((X, Y), {"indices": 2}, KeyError, "indices=2 is .*: there is no 2 in the tuple with 2 entries"),
        ((X, Y), {"labels": "y"}, KeyError, "labels='y' is .*: there is no 'y' in the tuple with 2 entries"),
        ({"a": {"x": X}, "b": {"x": Y}}, {"inputs": ["a.x", "b.x"]}, ValueError, "two entries as the same keyword"),
        ("words", {}, TypeError, r"a tensor, .* or a dataclass, got str: override unpack\(batch\) to return Batch\("),
        (3, {}, TypeError, "got int"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unpack(batch, **keys)
