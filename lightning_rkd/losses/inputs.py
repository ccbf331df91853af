"""Inputs of losses: selection of the features that a loss reads, and checks of labels, indices, view and mix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.utils.types import Mix, Outputs

Features = Tensor | Sequence[Tensor] | Outputs | Mapping[str, Outputs]
"""Features of one network: the value that a loss reads, or ``Outputs``, also by tap, that contain it."""

FIELDS = frozenset({"embedding", "logits", "feature_maps", "classifier"})

_CURES = {
    "logits": ": name the layer whose output they are",
    "classifier": ": read the layer that makes the logits, one with a weight (K, D), as Tap(layer, at='classifier')",
    "feature_maps": ": name a list of layers",
    "embedding": ": name one layer whose output is (N, D)",
}


def resolve_taps(taps: Sequence[str], tap: str | None, reads: str | tuple[str, ...], *, who: str) -> dict[str, str]:
    """Tap of each field that a loss reads: the one that is named, else the only one, else that of the field's name."""
    fields = (reads,) if isinstance(reads, str) else reads
    if tap is not None and set(taps) != {""}:
        if tap not in taps:
            raise ValueError(f"{who}: there is no tap {tap!r}; the taps are {sorted(taps)}")
        return dict.fromkeys(fields, tap)
    if len(taps) == 1:
        return dict.fromkeys(fields, taps[0])
    if all(field in taps for field in fields):
        return {field: field for field in fields}
    raise ValueError(
        f"{who}: reads {reads!r}, but the network is tapped at {sorted(taps)}; "
        f"say which one with loss.at({min(taps)!r})"
    )


def select_tap(features: Any, tap: str | None, reads: str | tuple[str, ...], *, who: str) -> Any:
    """Select the outputs at a tap as :func:`resolve_taps` does; features that are not a mapping are returned as is."""
    if not isinstance(features, Mapping):
        return features
    return combine_fields(features, resolve_taps(list(features), tap, reads, who=who))


def combine_fields(features: Mapping[str, Outputs], taps: Mapping[str, str]) -> Outputs:
    """Combine fields of several taps in one ``Outputs``."""
    if len(set(taps.values())) == 1:
        return features[next(iter(taps.values()))]
    return Outputs(**{field: getattr(features[tap], field) for field, tap in taps.items()})


def select_fields(features: Any, reads: str | tuple[str, ...], *, who: str) -> Any:
    """Select the value that a loss reads: a field of ``Outputs``, ``Outputs`` for several fields, or a bare value."""
    if isinstance(features, Mapping):
        features = select_tap(features, None, reads, who=who)
    fields = (reads,) if isinstance(reads, str) else reads
    if isinstance(features, Outputs):
        absent = [f for f in fields if getattr(features, f) is None]
        if absent:
            raise ValueError(f"{who}: the tapped layer has no {' and no '.join(absent)}{_CURES.get(absent[0], '')}")
        return getattr(features, reads) if isinstance(reads, str) else features
    if not isinstance(reads, str):
        raise TypeError(f"{who}: this loss reads {reads}, so it takes Outputs, got {type(features).__name__}")
    return features


def select_maps(value: Any, positions: Sequence[int] | None, *, who: str) -> Any:
    """Select feature maps by position; without positions, all."""
    if positions is None or isinstance(value, Tensor) or not isinstance(value, Sequence):
        return value
    for position in positions:
        if not -len(value) <= position < len(value):
            raise ValueError(
                f"{who}: there is no map {position} among the {len(value)} that are read; feature_maps counts from 0, "
                "or from the end with negative numbers"
            )
    return [value[position] for position in positions]


def pair_tensors(student: Any, teacher: Any, reads: str | tuple[str, ...], name: str) -> list[tuple[str, Any, Any]]:
    """Pair the tensors that a loss compares, as (field, student tensor, teacher tensor)."""
    if isinstance(student, Outputs):
        found = [(f, getattr(student, f), getattr(teacher, f)) for f in ("embedding", "logits")]
        found = [pair for pair in found if pair[1] is not None and pair[2] is not None]
        if student.feature_maps is not None and teacher.feature_maps is not None:
            found += _pair_maps(student.feature_maps, teacher.feature_maps, name)
    elif reads in ("embedding", "logits"):
        found = [(str(reads), student, teacher)]
    elif isinstance(student, Tensor) or isinstance(teacher, Tensor):
        if reads == "feature_maps":
            raise TypeError(f"{name}: feature maps come as a list, also a single one: pass [map] for both networks")
        found = [(str(reads), student, teacher)]
    else:
        for network, value in (("student", student), ("teacher", teacher)):
            if not isinstance(value, Sequence):
                raise TypeError(
                    f"{name}: reads the {reads} of the {network}, a list of tensors, got {type(value).__name__}"
                )
        found = _pair_maps(student, teacher, name)
    if not found:
        raise ValueError(f"{name}: nothing to compare")
    return found


def _pair_maps(student: Sequence[Any], teacher: Sequence[Any], name: str) -> list[tuple[str, Any, Any]]:
    if len(student) != len(teacher):
        raise ValueError(
            f"{name}: {len(student)} feature maps of the student and {len(teacher)} of the teacher; name as many "
            "layers of each"
        )
    return [(f"feature_maps[{i}]", a, b) for i, (a, b) in enumerate(zip(student, teacher, strict=True))]


def check_context(context: dict[str, Any], rows: int, field: str, device: torch.device, name: str) -> dict[str, Any]:
    """Check labels, indices, view and mix, and convert whole numbers to int64.

    Values are checked on a CPU only, since the host would have to wait for other devices.
    """
    checked = dict(context)
    for key in ("labels", "indices", "view"):
        if (value := context.get(key)) is not None:
            checked[key] = _check_column(value, key, rows, field, device, name)
    if (mix := context.get("mix")) is not None:
        _check_mix(mix, rows, field, name)
    return checked


def _check_column(value: Any, key: str, rows: int, field: str, device: torch.device, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")
    if value.ndim == 0 or len(value) != rows:
        count = "no rows" if value.ndim == 0 else f"{len(value)} rows"
        raise ValueError(f"{name}: {key} has {count}, but the {field} has {rows}")
    if value.is_complex() or (value.ndim == 1 and value.is_floating_point()):
        raise TypeError(f"{name}: {key} are whole numbers, one per row, got {value.dtype}; cast them, .long()")
    if value.device != device and key != "indices":  # memories move indices to their own device
        raise ValueError(f"{name}: {key} are on {value.device}, but the {field} on {device}; call .to({str(device)!r})")
    if not value.is_floating_point():
        return value.long()
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not value.isfinite().all():
        raise ValueError(f"{name}: soft {key} hold NaN or infinity; check the code that mixes them")
    return value


def _check_mix(mix: Mix, rows: int, field: str, name: str) -> None:
    for key, value in (("ratio", mix.ratio), ("partners", mix.partners), ("labels", mix.labels)):
        if value is not None and len(value) != rows:
            what = "mix" if key == "ratio" else f"mix.{key}"
            raise ValueError(f"{name}: {what} has {len(value)} rows, but the {field} has {rows}")
    on_cpu = mix.ratio.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not ((mix.ratio >= 0) & (mix.ratio <= 1)).all():
        raise ValueError(f"{name}: mix.ratio is each row's own share, between 0 and 1, got {mix.ratio.tolist()[:8]}")
