"""Dividing classes, or the samples of every class, among training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ClassSplit(NamedTuple):
    """Three disjoint lists of classes."""

    train: list[int]
    validation: list[int]
    test: list[int]


def split_classes(classes: Sequence[int], validation: float = 0.15, test: float = 0.25, seed: int = 0) -> ClassSplit:
    """Deal classes at random: first the unseen test classes, then, out of the training side, those for validation.

    Args:
        classes: What is dealt.
        validation: Part of all classes that validate, at least 2 of them.
        test: Part of all classes that test, at least 2 of them.
        seed: Not negative. The test classes depend on ``test`` and ``seed`` only.

    Raises:
        ValueError: When fewer than 2 classes would be left for training, or the parts are no parts.

    Example:
        >>> split = split_classes(range(20))
        >>> [len(part) for part in split], sorted(sum(split, [])) == list(range(20))
        ([12, 3, 5], True)
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(f"validation and test are parts of the classes, below 1 together; got {validation} and {test}")
    n_test, n_validation = max(2, round(test * len(classes))), max(2, round(validation * len(classes)))
    if len(classes) - n_test - n_validation < 2:
        raise ValueError(
            f"{len(classes)} classes are too few: 2 must train, 2 validate and 2 test, and the parts "
            f"validation={validation}, test={test} ask for {n_validation} and {n_test}"
        )
    dealt = [classes[i] for i in np.random.default_rng(seed).permutation(len(classes))]
    parts = dealt[n_test + n_validation :], dealt[n_test : n_test + n_validation], dealt[:n_test]
    return ClassSplit(*(sorted(part) for part in parts))


def disjoint(split: ClassSplit, names: Sequence[str]) -> ClassSplit:
    """The same split, unless two parts share a class or a part that needs classes has none.

    Raises:
        ValueError: It names the class and the parts.
    """
    for i, part in enumerate(split._fields):
        for other in split._fields[i + 1 :]:
            if both := set(split[i]) & set(getattr(split, other)):
                raise ValueError(f"the split shares classes: {names[min(both)]!r} is in {part} and in {other}")
    if not split.train or not split.test:
        raise ValueError(f"{'test' if split.train else 'train'} has no classes")
    return split


def hold_out(train: Sequence[int], test: Sequence[int], validation: float = 0.15, seed: int = 0) -> ClassSplit:
    """A published split into training and test classes, with some of the former taken out at random for validation.

    Args:
        train: The training classes.
        test: The test classes.
        validation: Part of the training classes that validate, at least 2 of them; 0 trains on all of them, as
            publications do, and nothing validates.
        seed: Not negative.

    Raises:
        ValueError: When fewer than 2 classes would be left for training, or the part is no part.

    Example:
        >>> [len(part) for part in hold_out(range(100), range(100, 200), 0.1)], hold_out([0, 1], [2, 3], 0)
        ([90, 10, 100], ClassSplit(train=[0, 1], validation=[], test=[2, 3]))
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a part of the training classes, at least 0 and below 1; got {validation}")
    taken = max(2, round(validation * len(train))) if validation else 0
    if len(train) - taken < 2 or len(test) < 1:
        raise ValueError(
            f"{len(train)} training and {len(test)} test classes are too few: 2 must train, and "
            f"validation={validation} takes {taken}"
        )
    dealt = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    return ClassSplit(sorted(dealt[taken:]), sorted(dealt[:taken]), sorted(test))


def split_samples(
    labels: Sequence[int],
    validation: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
    official: Sequence[bool] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Deal the rows of every class at random, the same parts of each: first the test rows, then those for validation.

    Args:
        labels: Class of every row.
        validation: Part of a class's rows that validate, at least 1.
        test: Part of a class's rows that test, at least 1.
        seed: Not negative. The test rows depend on ``test`` and ``seed`` only.
        official: Which rows test, where that is given; then ``validation`` is a part of the others, or 0, and ``test``
            does not matter.

    Returns:
        Rows for training, validation and test, each ascending.

    Raises:
        ValueError: A class with fewer than 3 rows, or with none left to train; or the parts are no parts.

    Example:
        >>> [len(part) for part in split_samples([0] * 20 + [1] * 10)]
        [18, 5, 7]
    """
    if official is not None:
        if not 0 <= validation < 1:
            raise ValueError(f"validation is a part of the samples, at least 0 and below 1; got {validation}")
    elif not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(f"validation and test are parts of the samples, below 1 together; got {validation} and {test}")
    rows_of: dict[int, list[int]] = {}
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row, label in enumerate(labels):
        if official is not None and official[row]:
            parts[2].append(row)
        else:
            rows_of.setdefault(label, []).append(row)
    for label in sorted(rows_of):
        rows = rows_of[label]
        n_test = 0 if official is not None else max(1, round(test * len(rows)))
        n_validation = max(1, round(validation * len(rows))) if validation else 0
        if len(rows) - n_test - n_validation < 1:
            raise ValueError(f"class {label} has {len(rows)} samples, too few to train, validate and test with")
        dealt = [rows[i] for i in np.random.default_rng((seed, label)).permutation(len(rows))]
        for part, chosen in zip(
            parts, (dealt[n_test + n_validation :], dealt[n_test : n_test + n_validation], dealt[:n_test]), strict=True
        ):
            part.extend(chosen)
    return sorted(parts[0]), sorted(parts[1]), sorted(parts[2])
