"""Division of classes, or of the samples of every class, among training, validation and test."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class ClassSplit(NamedTuple):
    """Three disjoint lists of classes."""

    train: list[int]
    validation: list[int]
    test: list[int]


def split_classes(classes: Sequence[int], validation: float = 0.15, test: float = 0.25, seed: int = 0) -> ClassSplit:
    """Divide classes at random: first the test classes, then the validation classes out of the others.

    ``validation`` and ``test`` are parts of all classes, at least 2 of them. The test classes depend on ``test`` and
    ``seed`` only.
    """
    _check_parts("classes", validation, test)
    n_test, n_validation = max(2, round(test * len(classes))), max(2, round(validation * len(classes)))
    if len(classes) - n_test - n_validation < 2:
        raise ValueError(
            f"{len(classes)} classes are too few: 2 must train, 2 validate and 2 test, and the parts "
            f"validation={validation}, test={test} take {n_validation} and {n_test}"
        )
    return ClassSplit(*_deal(classes, n_validation, n_test, seed))


def hold_out(train: Sequence[int], test: Sequence[int], validation: float = 0.15, seed: int = 0) -> ClassSplit:
    """Take validation classes, at least 2 or none, at random out of the training classes of a published split."""
    _check_parts("training classes", validation)
    taken = max(2, round(validation * len(train))) if validation else 0
    if len(train) - taken < 2 or len(test) < 1:
        raise ValueError(
            f"{len(train)} training and {len(test)} test classes are too few: 2 must train, and "
            f"validation={validation} takes {taken}"
        )
    rest, held, _ = _deal(train, taken, 0, seed)
    return ClassSplit(rest, held, sorted(test))


def split_samples(
    labels: Sequence[int],
    validation: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
    official: Sequence[bool] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Divide the rows of every class at random, in equal parts: first the test rows, then the validation rows.

    ``validation`` and ``test`` are parts of a class's rows, at least 1. The test rows depend on ``test`` and ``seed``
    only, or are the published ones that ``official`` marks; then ``validation`` is a part of the others, or 0.
    """
    _check_parts("samples", validation, test if official is None else None)
    rows_of: dict[int, list[int]] = {}
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row, label in enumerate(labels):
        if official is not None and official[row]:
            parts[2].append(row)
        else:
            rows_of.setdefault(label, []).append(row)
    for label, rows in sorted(rows_of.items()):
        n_test = max(1, round(test * len(rows))) if official is None else 0
        n_validation = max(1, round(validation * len(rows))) if validation else 0
        if len(rows) - n_test - n_validation < 1:
            raise ValueError(f"class {label} has {len(rows)} samples, too few to train, validate and test with")
        for part, chosen in zip(parts, _deal(rows, n_validation, n_test, (seed, label)), strict=True):
            part.extend(chosen)
    return sorted(parts[0]), sorted(parts[1]), sorted(parts[2])


def halve(classes: Sequence[Any]) -> tuple[range, range]:
    """Numbers of the first and of the second half of the classes."""
    return range(len(classes) // 2), range(len(classes) // 2, len(classes))


def check_disjoint(split: ClassSplit, names: Sequence[str]) -> ClassSplit:
    """Return the split if its parts share no class and there are classes to train and to test."""
    for i, part in enumerate(split._fields):
        for other in split._fields[i + 1 :]:
            if both := set(split[i]) & set(getattr(split, other)):
                raise ValueError(f"the split shares classes: {names[min(both)]!r} is in {part} and in {other}")
    if not split.train or not split.test:
        raise ValueError(f"{'test' if split.train else 'train'} has no classes")
    return split


def _check_parts(of: str, validation: float, test: float | None = None) -> None:
    if test is None and not 0 <= validation < 1:
        raise ValueError(f"validation is a part of the {of}, at least 0 and below 1; got {validation}")
    if test is not None and not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(f"validation and test are parts of the {of}, below 1 together; got {validation} and {test}")


def _deal(items: Sequence[int], validation: int, test: int, seed: int | tuple[int, int]) -> list[list[int]]:
    """Shuffle the items; the first ones test, the next ones validate, the others train."""
    dealt = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    return [sorted(part) for part in (dealt[test + validation :], dealt[test : test + validation], dealt[:test])]
