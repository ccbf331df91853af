"""What losses on logits ask of their inputs, in the words of the one that asks."""

from __future__ import annotations

import math

from torch import Tensor

_SHAPES = {2: "(N, K)", 4: "(N, K, H, W)"}
_CURES = {2: "pool them over the pixels first", 4: "read the logits before they are pooled"}


def check_logits(student: Tensor, teacher: Tensor, who: str, *, dims: tuple[int, ...] = (2, 4)) -> None:
    """Refuse logits that cannot be compared class by class.

    Args:
        student: Logits of the student.
        teacher: Logits of the teacher.
        who: The loss that asks; begins every message.
        dims: How many dimensions the loss takes: 2 for (N, K), 4 for dense (N, K, H, W).

    Raises:
        ValueError: Another number of dimensions, or sides that differ in classes, samples or spatial size.

    Example:
        >>> import torch
        >>> check_logits(torch.ones(2, 10), torch.ones(2, 10), "SoftTarget")
    """
    for side, z in (("student", student), ("teacher", teacher)):
        if z.ndim not in dims:
            cure = f"; {_CURES[dims[0]]}" if len(dims) == 1 else ""
            raise ValueError(
                f"{who}: the {side}'s logits must be {' or '.join(_SHAPES[d] for d in dims)}, "
                f"got {tuple(z.shape)}{cure}"
            )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{who}: the student has {student.shape[1]} classes, the teacher {teacher.shape[1]}, but their logits are "
            "compared class by class; select the columns of the classes that both know, or distil embeddings instead "
            "(RKD does not need classes)"
        )
    if student.shape != teacher.shape:
        cure = (
            "; resize one of them first" if student.ndim == teacher.ndim == 4 and len(student) == len(teacher) else ""
        )
        raise ValueError(
            f"{who}: the logits must have the same shape, got {tuple(student.shape)} from the student and "
            f"{tuple(teacher.shape)} from the teacher{cure}"
        )


def pixels_as_rows(logits: Tensor) -> Tensor:
    """Dense logits with one row per pixel; ordinary ones as they are.

    Shapes: (N, K) -> (N, K); (N, K, H, W) -> (N H W, K).

    Example:
        >>> import torch
        >>> pixels_as_rows(torch.ones(2, 5, 3, 3)).shape
        torch.Size([18, 5])
    """
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def check_classes(labels: Tensor, classes: int, who: str) -> None:
    """Refuse class numbers that the logits do not have; on a CPU, since other devices would be waited for.

    Raises:
        ValueError: Naming the smallest and the largest label.

    Example:
        >>> import torch
        >>> check_classes(torch.tensor([0, 4]), 5, "STKD")
    """
    if labels.device.type != "cpu":
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{who}: labels go from {low} to {high}, but the logits have {classes} classes; number the classes from 0, "
            "and give the networks an output for each"
        )


def check_positive(who: str, **values: float) -> None:
    """Refuse a setting that is not a positive, finite number.

    Raises:
        ValueError: Naming loss and setting.

    Example:
        >>> check_positive("SoftTarget", temperature=4)
    """
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{who}: {name} must be a positive number, got {value}")
