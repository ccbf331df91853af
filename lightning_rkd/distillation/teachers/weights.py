"""Loading of weights files: every key matched, damage detected."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_rkd.utils.files import check_file, check_sum

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # isfinite knows no smaller types


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a Lightning checkpoint, a state dict or a safetensors file; every key must match.

    The state dict may lie at any depth of dicts, as in ``{"state_dict": ...}`` or ``{"model": ..., "epoch": 3}``; of a
    Lightning checkpoint only ``state_dict`` is read. A prefix common to the network's keys (``student.`` in a
    checkpoint of ``DistillationModule``, ``module.`` of ``DataParallel``, ``model.`` in many others) is found and
    removed, as is the ``_orig_mod.`` of compiled parts. A file in which several state dicts fit, such as ``model`` and
    ``ema``, is refused; among several prefixes of one state dict ``student.`` is taken. Besides tensors and plain
    values a file may hold an ``argparse.Namespace``.

    The checksums inside files of ``torch.save`` are verified. Safetensors files have none; for these, and any other
    file, the SHA-256 in a file beside it is verified: ``sha256sum net.safetensors > net.safetensors.sha256``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds a pickled module, a weight is NaN or infinite, no state dict fits the
            network or several do, or the path is the folder of a sharded checkpoint.

    Example:
        >>> import tempfile
        >>> net, file = nn.Linear(2, 1), tempfile.NamedTemporaryFile(suffix=".pt")
        >>> torch.save({"state_dict": {"student.weight": torch.ones(1, 2), "student.bias": torch.ones(1)}}, file.name)
        >>> load_weights(net, file.name); net.weight
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"the weights {str(path)!r} are a folder, as sharded checkpoints are; make one file of it first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights file {str(path)!r} does not exist; train the network first, or correct it"
        )
    kind, file, own = type(network).__name__, str(path), network.state_dict()
    names = {_plain_name(name): name for name in own}
    wanted = {k: tuple(own[name].shape) for k, name in names.items()}
    states = dict(_find_states(_read_file(path)))

    def misfits(at: str, prefix: str) -> list[str]:
        shapes = {k: tuple(x.shape) for k, x in states[at].items()}
        return [k for k, shape in wanted.items() if shapes.get(prefix + k) != shape]

    first = next(iter(wanted), "")
    prefixes = {(at, k.removesuffix(first)) for at in states for k in states[at] if f".{k}".endswith(f".{first}")}
    found = sorted((misfits(*place), *place) for place in prefixes)
    fitting = [(at, prefix) for missing, at, prefix in found if not missing]
    if len({at for at, _ in fitting}) == 1:
        fitting = next(([one] for p in ("student.", "") for one in fitting if one[1] == p), fitting)
    if len(fitting) > 1:
        raise ValueError(
            f"{file!r} holds weights of this {kind} under several prefixes, {[at + prefix for at, prefix in fitting]}; "
            "save the state dict of the one you mean to a file of its own"
        )
    if not found:
        have = sorted({k for state in states.values() for k in state})[:3] or "none"
        raise ValueError(
            f"{file!r} does not hold the weights of this {kind}: it needs {len(wanted)} tensors such as {first!r}, the "
            f"file has {have}"
        )
    if not fitting:
        missing, at, prefix = min(found, key=lambda one: len(one[0]))
        key = prefix + missing[0]
        have = f"has shape {tuple(states[at][key].shape)} in" if key in states[at] else "is not in"
        raise ValueError(
            f"{file!r} does not hold the weights of this {kind}: {at + key!r} {have} the file, the network needs "
            f"{wanted[missing[0]]} ({len(missing)} of {len(wanted)} tensors do not fit): build it as the saved one was"
        )
    ((at, prefix),) = fitting
    weights = {name: states[at][prefix + k] for k, name in names.items()}
    for name, _ in network.named_parameters():
        if weights[name].dtype in _CHECKED and not weights[name].isfinite().all():
            raise ValueError(f"{file!r} holds NaN or infinity in {at + prefix + name!r}; use an earlier one")
    network.load_state_dict(weights)


def _plain_name(name: str) -> str:
    """Name without the prefixes that torch.compile puts before what it wraps."""
    return name.replace("_orig_mod.", "")


def _find_states(content: Any, at: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All dicts of tensors in nested dicts, with their paths."""
    if not isinstance(content, Mapping):
        return
    if "pytorch-lightning_version" in content and "state_dict" in content:
        content = content["state_dict"]  # the others are states of callbacks and optimizers
    state = {_plain_name(k): x for k, x in content.items() if isinstance(k, str) and isinstance(x, Tensor)}
    if state:
        yield at, state
    for key, entry in content.items():
        yield from _find_states(entry, f"{at}{key}.")


def _read_file(path: Path) -> Any:
    """Content of an intact file."""
    verified = check_sum(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"the weights file {str(path)!r} is damaged or cut short ({error})") from error
    if not verified:
        check_file(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of many types
        # not PyTorch's message, which recommends to switch its protection off
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds an object of {found[1]}"
        else:
            reason = "it is damaged, or was not written by torch.save"
        raise ValueError(
            f"{str(path)!r} holds no weights that can be read safely: {reason}; where it was made, "
            "torch.save(net.state_dict(), path) saves them"
        ) from None
