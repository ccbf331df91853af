"""Loading of weights files: every key matched, damage detected."""

import os
from collections.abc import Mapping
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

    A prefix common to the network's keys (``student.`` in a checkpoint of ``DistillationModule``, ``model.`` in many
    others) is found and removed. The checksums inside files of ``torch.save`` are verified. Safetensors files have
    none; for these, and any other file, the SHA-256 in a file beside it is verified:
    ``sha256sum net.safetensors > net.safetensors.sha256``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, a weight is NaN or infinite, keys or shapes do not fit the network, or the path
            is the folder of a sharded checkpoint.

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
    state = _read_state(path)
    network = getattr(network, "_orig_mod", network)  # torch.compile puts its own prefix before every name
    shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    first = next(iter(wanted), "")
    prefixes = {key.removesuffix(first) for key in shapes if f".{key}".endswith(f".{first}")}
    misfits = {p: [k for k, shape in wanted.items() if shapes.get(p + k) != shape] for p in prefixes}
    fitting = sorted(p for p, misfit in misfits.items() if not misfit)
    preferred = [p for p in ("student.", "") if p in fitting]
    if preferred or len(fitting) == 1:
        prefix = (preferred or fitting)[0]
        for name, _ in network.named_parameters():
            weight = state[prefix + name]
            if weight.dtype in _CHECKED and not weight.isfinite().all():
                raise ValueError(f"{str(path)!r} holds NaN or infinity in {prefix + name!r}; use an earlier one")
        network.load_state_dict({k: state[prefix + k] for k in wanted})
        return
    if fitting:
        raise ValueError(
            f"{str(path)!r} holds weights of this {type(network).__name__} under several prefixes, {fitting}; "
            "save the state dict of the one you mean to a file of its own"
        )
    message = f"{str(path)!r} does not hold the weights of this {type(network).__name__}: "
    if misfits:
        prefix = min(misfits, key=lambda p: (len(misfits[p]), p))
        key = misfits[prefix][0]
        have = f"has shape {shapes[prefix + key]} in the file" if prefix + key in shapes else "is not in the file"
        raise ValueError(
            f"{message}{prefix + key!r} {have}, the network needs {wanted[key]} "
            f"({len(misfits[prefix])} of {len(wanted)} tensors do not fit)"
        )
    raise ValueError(
        f"{message}it needs {len(wanted)} tensors such as {first!r}, the file has {sorted(shapes)[:3] or 'none'}"
    )


def _read_state(path: Path) -> Mapping[str, Any]:
    """State dict of an intact file."""
    verified = check_sum(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"the weights file {str(path)!r} is damaged or cut short ({error})") from error
    if not verified:
        check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of many types
        raise ValueError(f"{str(path)!r} holds no weights that can be read safely: {error}") from error
    return state.get("state_dict", state) if isinstance(state, Mapping) else {}
