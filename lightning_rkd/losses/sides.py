"""What a loss is given for one network: picking the value it reads, checking it, casting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.utils.types import Outputs

Side = Tensor | Sequence[Tensor] | Outputs | Mapping[str, Outputs]
"""What a loss may be given for one network: the value it reads, or ``Outputs`` (per tap) to pick it from."""

FIELDS = frozenset({"embedding", "logits", "feature_maps", "classifier"})


class NonFiniteError(ValueError):
    """An embedding, logit or map holds NaN or infinity, or a loss of finite ones overflows."""


def at_tap(side: Side, tap: str | None, reads: str | tuple[str, ...], *, who: str) -> Any:
    """Pick from a mapping of taps: the named tap, else the only one, else the tap named like the field."""
    if not isinstance(side, Mapping):
        return side
    if tap is not None and set(side) != {""}:
        if tap not in side:
            raise ValueError(f"{who}: there is no tap {tap!r}; the taps are {sorted(side)}")
        return side[tap]
    if len(side) == 1:
        return next(iter(side.values()))
    fields = (reads,) if isinstance(reads, str) else reads
    if all(field in side for field in fields):
        return Outputs(**{field: getattr(side[field], field) for field in fields})
    raise ValueError(
        f"{who}: reads {reads!r}, but the network is tapped at {sorted(side)}; "
        f"say which one with loss.at({min(side)!r})"
    )


def pick(side: Any, reads: str | tuple[str, ...], *, who: str) -> Any:
    """The value a loss reads: the field of ``Outputs``, or the bare tensor it was given."""
    if isinstance(side, Mapping):
        side = at_tap(side, None, reads, who=who)
    fields = (reads,) if isinstance(reads, str) else reads
    if isinstance(side, Outputs):
        absent = [f for f in fields if getattr(side, f) is None]
        if absent:
            raise ValueError(f"{who}: the tapped layer shows no {' and no '.join(absent)}{_CURE.get(absent[0], '')}")
        return getattr(side, reads) if isinstance(reads, str) else side
    if not isinstance(reads, str):
        raise TypeError(f"{who}: this loss reads {reads}, so it takes Outputs, got {type(side).__name__}")
    return side


_CURE = {
    "logits": ": tap the Linear layer that makes them, or any layer whose output they are",
    "classifier": ": tap the Linear layer that makes the logits",
    "feature_maps": ": name a list of layers",
    "embedding": ": name one layer whose output is (N, D)",
}


def pairs(student: Any, teacher: Any, reads: str | tuple[str, ...], name: str) -> list[tuple[str, Tensor, Tensor]]:
    """All (field, student tensor, teacher tensor) that a loss is about to compare, checked.

    Raises:
        TypeError: Something is no floating-point tensor.
        ValueError: Sides that do not fit, lie on different devices, or hold NaN or infinity (CPU only).
    """
    found: list[tuple[str, Tensor, Tensor]] = []
    for who, side in (("student", student), ("teacher", teacher)) if reads in ("embedding", "logits") else ():
        if not isinstance(side, Tensor):
            raise TypeError(f"{name}: the {who}'s {reads} must be a tensor, got {type(side).__name__}")
    if isinstance(student, Outputs):
        for field in ("embedding", "logits"):
            a, b = getattr(student, field), getattr(teacher, field)
            if a is not None and b is not None:
                found.append((field, a, b))
        if student.feature_maps is not None and teacher.feature_maps is not None:
            found += _maps(student.feature_maps, teacher.feature_maps, name)
    elif reads == "feature_maps" and (isinstance(student, Tensor) or isinstance(teacher, Tensor)):
        raise TypeError(f"{name}: maps come as a list, also a single one: pass [map] for student and teacher")
    elif isinstance(student, Tensor):
        found.append((str(reads), student, teacher))
    else:
        for who, side in (("student", student), ("teacher", teacher)):
            if not isinstance(side, Sequence):
                raise TypeError(f"{name}: reads the {reads} of the {who}, a list of tensors, got {type(side).__name__}")
        found += _maps(student, teacher, name)
    for field, a, b in found:
        for side, x in (("student", a), ("teacher", b)):
            _check(x, field, side, name)
        if len(a) != len(b):
            raise ValueError(
                f"{name}: student and teacher must show the same N samples, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if len(a) != len(found[0][1]):
            raise ValueError(
                f"{name}: all that a network shows must be of the same N samples, got {len(found[0][1])} rows of "
                f"{found[0][0]} and {len(a)} of {field}"
            )
        if len(devices := {x.device for x in (found[0][1], a, b)}) > 1:
            raise ValueError(
                f"{name}: student and teacher must be on one device, got {' and '.join(sorted(map(str, devices)))}; "
                f"call .to({str(found[0][1].device)!r}) on the network or on what it shows"
            )
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(a, b, name=name)
    if not found:
        raise ValueError(f"{name}: nothing to compare")
    if "classifier" in reads and isinstance(student, Outputs) and found[0][1].device.type == "cpu":
        for who, side in (("student", student), ("teacher", teacher)):
            if not all(x.isfinite().all() for x in side.classifier or () if x is not None):
                raise NonFiniteError(f"{name}: the {who}'s classifier holds NaN or infinity")
    return found


def _maps(student: Sequence[Tensor], teacher: Sequence[Tensor], name: str) -> list[tuple[str, Tensor, Tensor]]:
    if len(student) != len(teacher):
        raise ValueError(
            f"{name}: the student shows {len(student)} maps, the teacher {len(teacher)}; name as many layers of each"
        )
    return [(f"maps[{i}]", a, b) for i, (a, b) in enumerate(zip(student, teacher, strict=True))]


def _check(x: Any, field: str, side: str, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: the {side}'s {field} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: the {side}'s {field} must be floating point, got {x.dtype}; call .float() on it")
    if x.dtype not in _PRECISIONS:
        raise TypeError(f"{name}: the {side}'s {field} is {x.dtype}, in which nothing can be computed; call .float()")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: the {side}'s {field} must be dense, got {x.layout}; call .to_dense() on it")
    if x.is_meta:
        raise ValueError(f"{name}: the {side}'s {field} is on the meta device, where tensors hold no numbers")
    if field == "embedding" and x.ndim != 2:
        raise ValueError(
            f"{name}: the {side}'s embedding must be (N, D), got {tuple(x.shape)}; pool it with "
            "Tap(layer, read=global_pool) or mean_pool, cls_token"
        )
    if field != "embedding" and x.ndim < 2:
        raise ValueError(f"{name}: the {side}'s {field} must begin with (N, ...), got {tuple(x.shape)}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name}: the {side}'s {field} is empty, shape {tuple(x.shape)}")


_PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_value(value: Tensor, read: Sequence[tuple[str, Tensor, Tensor]], loss: nn.Module) -> None:
    """Raise :class:`NonFiniteError` where a loss of finite sides is none that its student's precision can hold.

    Args:
        value: The loss.
        read: What it compared, as :func:`pairs` gives it.
        loss: The module, whose own parameters may be what is broken.
    """
    dtype = torch.float32
    for _, a, _ in read:
        dtype = torch.promote_types(dtype, a.dtype)
    if (value.detach().abs() <= min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)).all():
        return
    name = type(loss).__name__
    for own, x in (*loss.named_parameters(), *loss.named_buffers()):
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"{name}: its own {own} holds NaN or infinity: an earlier step has spoilt it; lower the learning rate, "
                "or clip gradients"
            )
    largest = ", ".join(f"{field} {a.abs().max():.1e} and {b.abs().max():.1e}" for field, a, b in read)
    raise NonFiniteError(
        f"{name}: overflow: both sides are finite, but the loss is {value.detach().flatten()[0]:.1e}, which {dtype} "
        f"cannot hold. The largest magnitudes of student and teacher are: {largest}. Scale down or normalise what is "
        "large, or pass float64"
    )


def check_finite(student: Tensor, teacher: Tensor, *, name: str = "the loss") -> None:
    """Raise :class:`NonFiniteError` naming side and row if either tensor holds NaN or infinity."""
    for side, x in (("student", student), ("teacher", teacher)):
        finite = torch.isfinite(x.detach())
        if not finite.all():
            row = int((~finite.flatten(1).all(1)).nonzero()[0])
            raise NonFiniteError(f"{name}: the {side}'s output holds NaN or infinity, first in row {row} of {len(x)}")


def cast(value: Any, dtype: torch.dtype, detach: bool = False) -> Any:
    """A side in another precision and, to ``detach``, out of the graph."""
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
            value = value.clone()  # of a teacher run in inference mode: such tensors cannot be saved for backward
        return (value.detach() if detach else value).to(dtype)
    if isinstance(value, Outputs):
        return Outputs(**{f: cast(v, dtype, detach) for f in FIELDS if (v := getattr(value, f)) is not None})
    if value is None:
        return None
    return type(value)(cast(v, dtype, detach) for v in value)
