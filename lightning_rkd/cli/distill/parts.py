"""Division of the rows among training, validation and test."""

from typing import NamedTuple

import numpy as np
import torch

from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.data.datamodules.splits import hold_out, split_classes

_FEWEST_CLASSES = 8  # two to test, two to validate, and some to train


class Parts(NamedTuple):
    """Rows of each part, and how they were divided."""

    train: list[int]
    validation: list[int]
    test: list[int]
    how: str


def split_rows(samples: Samples, test: bool, seed: int = 0) -> Parts:
    """Divide the rows: by class where there are enough classes, so that test classes are unseen in training.

    A fifth of the classes (rows) tests, unless there are test data of their own, and a tenth validates.
    """
    counts = (
        [] if samples.labels is None else torch.bincount(samples.labels, minlength=len(samples.class_names)).tolist()
    )
    several = [c for c, n in enumerate(counts) if n >= 2]
    if samples.labels is not None and len(several) >= _FEWEST_CLASSES:
        split = split_classes(several, 0.1, 0.2, seed) if test else hold_out(several, [0], 0.1, seed)
        part = torch.zeros(len(counts), dtype=torch.int64)  # classes of one sample train
        part[split.validation] = 1
        if test:
            part[split.test] = 2
        train, validation, tested = ((part[samples.labels] == i).nonzero().flatten().tolist() for i in range(3))
        sizes = [len(counts) - len(split.validation) - test * len(split.test), len(split.validation), len(split.test)]
        words = f"by class, {sizes[0]} to train and {sizes[1]} to validate" + (f", {sizes[2]} to test" if test else "")
        return Parts(train, validation, tested, words)
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    tests, validates = (round(part * len(order)) for part in (0.2 * test, 0.1))
    parts = (order[tests + validates :], order[tests : tests + validates], order[:tests])
    train, validation, tested = map(sorted, parts)
    return Parts(train, validation, tested, "at random, without regard to classes")
