"""What a loss is given beside the two sides: labels, indices, views and mixes, checked before any maths sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.utils.types import Mix


def checked_context(
    context: Mapping[str, Any], rows: int, field: str, device: torch.device, name: str
) -> dict[str, Any]:
    """The context with whole numbers as int64, refused where it does not go with the batch.

    What is on another device than a CPU is not looked into, as the host would have to wait for it.

    Args:
        context: What the loss was called with.
        rows: N.
        field: What the loss reads, for messages.
        device: Where the sides are.
        name: Of the loss, for messages.

    Raises:
        TypeError: Something is no tensor, or of a type that it cannot be.
        ValueError: Another number of rows, another device, numbers that are not finite.

    Example:
        >>> narrow = torch.tensor([1, 0], dtype=torch.uint8)
        >>> checked_context({"labels": narrow}, 2, "logits", torch.device("cpu"), "KD")
        {'labels': tensor([1, 0])}
    """
    checked = dict(context)
    for key in ("labels", "indices", "view"):
        if (value := context.get(key)) is not None:
            checked[key] = _column(value, key, rows, field, device, name)
    if (mix := context.get("mix")) is not None:
        _check_mix(mix, rows, field, name)
    return checked


def _column(value: Any, key: str, rows: int, field: str, device: torch.device, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")
    if value.ndim == 0 or len(value) != rows:
        count = "no rows" if value.ndim == 0 else f"{len(value)} rows"
        raise ValueError(f"{name}: {key} has {count}, but the {field} has {rows}")
    if value.is_complex() or (value.ndim == 1 and value.is_floating_point()):
        raise TypeError(f"{name}: {key} are whole numbers, one per row, got {value.dtype}; cast them, .long()")
    if value.device != device and key != "indices":  # which memories take to where they are
        raise ValueError(f"{name}: {key} are on {value.device}, but the {field} on {device}; call .to({str(device)!r})")
    if value.is_floating_point():
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and not value.isfinite().all():
            raise ValueError(f"{name}: soft {key} hold NaN or infinity; look at what mixes them")
        return value
    return value.long()


def _check_mix(mix: Mix, rows: int, field: str, name: str) -> None:
    for key, value in (("ratio", mix.ratio), ("partners", mix.partners), ("labels", mix.labels)):
        if value is not None and len(value) != rows:
            what = "mix" if key == "ratio" else f"mix.{key}"
            raise ValueError(f"{name}: {what} has {len(value)} rows, but the {field} has {rows}")
    looked_into = mix.ratio.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_into and not ((mix.ratio >= 0) & (mix.ratio <= 1)).all():
        raise ValueError(f"{name}: mix.ratio is each row's own share, between 0 and 1, got {mix.ratio.tolist()[:8]}")
