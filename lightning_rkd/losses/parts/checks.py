"""Checks of settings and inputs that several losses share; every message begins with the name of the loss."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_rkd.functional.similarities import unit_rows

Reads = Literal["embedding", "feature_maps"]
"""Fields that losses on either embeddings or maps read."""

_SHAPES = {2: "(N, K)", 4: "(N, K, H, W)"}
_CURES = {2: "pool them over the pixels first", 4: "read the logits before they are pooled"}


def check_positive(name: str, **values: float) -> None:
    """Raise ``ValueError`` for settings that are not positive, finite numbers."""
    for setting, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: {setting} must be a positive number, got {value}")


def check_at_least(name: str, least: float, **values: float) -> None:
    """Raise ``ValueError`` for settings below ``least``."""
    for setting, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}: {setting} must be at least {least}, got {value}")


def check_share(name: str, **values: float) -> None:
    """Raise ``ValueError`` for settings outside [0, 1]."""
    for setting, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {setting} must be between 0 and 1, got {value}")


def check_choice(name: str, choices: Any, **values: str) -> None:
    """Raise ``ValueError`` for settings that are not among the values of a ``Literal``."""
    for setting, value in values.items():
        if value not in get_args(choices):
            *names, last = map(repr, get_args(choices))
            raise ValueError(f"{name}: {setting} must be {', '.join(names)} or {last}, got {value!r}")


def check_maps_are_read(name: str, reads: str, feature_maps: Sequence[int] | None) -> None:
    """Raise ``ValueError`` for positions of maps where a loss reads embeddings."""
    if feature_maps is not None and reads != "feature_maps":
        raise ValueError(
            f"{name}: feature_maps={feature_maps!r} selects among maps, but the loss reads {reads!r}; pass "
            "reads='feature_maps' as well"
        )


def check_logits(student: Tensor, teacher: Tensor, name: str, *, dims: Sequence[int] = (2, 4)) -> None:
    """Raise ``ValueError`` for logits that cannot be compared class by class; 4 in ``dims`` allows dense ones."""
    for who, z in (("student", student), ("teacher", teacher)):
        if z.ndim not in dims:
            cure = f"; {_CURES[dims[0]]}" if len(dims) == 1 else ""
            expected = " or ".join(_SHAPES[d] for d in dims)
            raise ValueError(f"{name}: the {who}'s logits must be {expected}, got {tuple(z.shape)}{cure}")
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{name}: the student has {student.shape[1]} classes, the teacher {teacher.shape[1]}, but their logits are "
            "compared class by class; select the columns of the classes that both know, or distil embeddings instead "
            "(RKD does not need classes)"
        )
    if student.shape != teacher.shape:
        resize = student.ndim == teacher.ndim == 4 and len(student) == len(teacher)
        raise ValueError(
            f"{name}: the logits must have the same shape, got {tuple(student.shape)} from the student and "
            f"{tuple(teacher.shape)} from the teacher{'; resize one of them first' if resize else ''}"
        )


def check_classes(labels: Tensor, classes: int, name: str) -> None:
    """Raise ``ValueError`` for labels outside the classes of the logits; on a CPU only, to wait for no device."""
    if labels.device.type != "cpu":
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: labels go from {low} to {high}, but the logits have {classes} classes; number the classes from "
            "0, and give the networks an output for each"
        )


def pixels_as_rows(logits: Tensor) -> Tensor:
    """Dense logits with one row per pixel; other logits unchanged.

    Shapes: (N, K) -> (N, K); (N, K, H, W) -> (N H W, K).
    """
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def standardise_rows(logits: Tensor) -> Tensor:
    r"""Z-score of each row, before a temperature is applied (Sun, Ren, Li, Wang and Cao 2024, arXiv:2403.01427).

    .. math:: z_i \mapsto \frac{z_i - \operatorname{mean}(z_i)}{\operatorname{std}(z_i) + 10^{-7}}

    The standard deviation is the unbiased one, as in the authors' code. Constant rows become zeros without gradient.
    """
    rows = logits - logits[:, :1].detach()  # constant rows become exact zeros
    root = math.sqrt(max(1, logits.shape[1] - 1))
    return root * unit_rows(rows - rows.mean(1, keepdim=True), eps=1e-7 * root)
