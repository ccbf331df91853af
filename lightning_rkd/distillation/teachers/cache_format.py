"""Files of a teacher cache: safetensors shards of consecutive rows and a JSON manifest, each with its own SHA-256.

A *plan* describes a cache: ``rows``, ``views``, ``dtype``, ``shard_rows``, ``fields`` (name to width),
``teacher weights``, ``data length`` and so on. A shard holds ``shard_rows`` rows, one tensor (rows, views, width) for
each field, and the plan, so that an interrupted run can be resumed. The manifest holds the plan; it is written last.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rkd.data.fingerprint import describe_dataset
from lightning_rkd.data.indexing import count_root_rows
from lightning_rkd.utils.files import write_whole

MANIFEST = "manifest.json"
Plan = dict[str, Any]
_CURE = "; lightning-rkd cache, run again with the same options, rewrites it and keeps the intact files"


class CacheError(ValueError):
    """A cache that is damaged, incomplete, or made for another teacher or data set."""


class DamagedError(CacheError):
    """A file of a cache that is missing or does not match its digest."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"rows-{number:05d}.safetensors"


def write_shard(folder: Path, plan: Plan, number: int, fields: Mapping[str, Tensor]) -> None:
    """Write one shard, whole or not at all."""
    about = {**plan, "shard": number}
    # a single entry: safetensors does not keep the order of several
    entry = json.dumps({**about, "sha256": _digest(about, fields)}, sort_keys=True)
    write_whole(folder / shard_name(number), save(dict(fields), {"rkd": entry}))


def read_shard(folder: Path, plan: Plan, number: int) -> dict[str, Tensor]:
    """Memory-mapped tensors of a shard, which is read once to verify its digest and must be of the same plan."""
    path = folder / shard_name(number)
    if not path.exists():
        raise DamagedError(f"the shard {str(path)!r} is missing{_CURE}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["rkd"])
            fields = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        intact = about.pop("sha256") == _digest(about, fields)
    except Exception:  # a damaged header raises errors of many types
        intact = False
    if not intact:
        raise DamagedError(f"the shard {str(path)!r} is damaged or cut short: its SHA-256 does not match{_CURE}")
    refuse_differences(about, {**plan, "shard": number}, path)
    return fields


def write_manifest(folder: Path, plan: Plan) -> None:
    """Write the manifest, which completes a cache."""
    text = json.dumps({**plan, "sha256": _digest(plan)}, indent=1, sort_keys=True)
    write_whole(folder / MANIFEST, text.encode())


def refuse_differences(found: Plan, wanted: Plan, path: Path) -> None:
    """Raise a :class:`CacheError` where a plan differs from the parts that are wanted; the message names them."""
    parts = [f"{k}: cached {found.get(k)!r}, now {v!r}" for k, v in sorted(wanted.items()) if found.get(k) != v]
    if parts:
        raise CacheError(
            f"the cache {str(path)!r} was made for something else: {'; '.join(parts)}. Use it with what it was made "
            "for, name another folder, or replace it: lightning-rkd cache --config RECIPE --out FOLDER --overwrite"
        )


class CacheReader:
    """Rows of a complete cache, read from memory-mapped shards; its plan must have the ``wanted`` parts.

    The manifest is verified at once, a shard when its first row is read.
    """

    def __init__(self, folder: Path, wanted: Plan) -> None:
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} does not exist, the cache is missing or incomplete. Write it with lightning-rkd cache "
                f"--config RECIPE --out {folder}"
            )
        try:
            plan = json.loads(path.read_bytes())
            self.fingerprint = plan.pop("sha256")
            intact = self.fingerprint == _digest(plan)
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise DamagedError(f"the manifest {str(path)!r} is damaged: its SHA-256 does not match{_CURE}")
        refuse_differences(plan, wanted, folder)
        self.folder, self.plan = folder, plan
        self._shards: dict[int, dict[str, Tensor]] = {}

    def check_data(self, loader: Any, ignore: Collection[str] = ()) -> None:
        """Compare a loader's data set with the cached one; a cache without augmentation serves any augmentation."""
        count_rows(loader)
        ignore = {*ignore, "augmentation"} if self.plan["data augmentation"] == "none" else ignore
        found = {f"data {key}": text for key, text in describe_dataset(loader.dataset).items() if key not in ignore}
        refuse_differences(self.plan, found, self.folder)

    def read(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """Rows of every field, (N, width) each, in float32; the view is the epoch modulo ``views``."""
        rows, size, view = self.plan["rows"], self.plan["shard_rows"], epoch % self.plan["views"]
        if len(outside := indices[(indices < 0) | (indices >= rows)]):
            raise CacheError(f"the batch has the index {int(outside[0])}, but {self.folder} has rows 0 to {rows - 1}")
        numbers = indices.div(size, rounding_mode="floor")
        out = {name: torch.empty(len(indices), width) for name, width in self.plan["fields"].items()}
        for number in set(numbers.tolist()):
            if number not in self._shards:
                self._shards[number] = read_shard(self.folder, self.plan, number)
            here = (numbers == number).nonzero().flatten()
            for name, x in self._shards[number].items():
                out[name][here] = x[:, view].index_select(0, indices[here] - number * size).float()
        return out


def count_rows(loader: Any) -> int:
    """Number of rows of the root data set behind a loader, which must be map-style."""
    rows = count_root_rows(loader.dataset) if isinstance(loader, DataLoader) else None
    if rows is None:
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise CacheError(f"a cached teacher needs one DataLoader over a map-style data set with a length, got {kind}")
    return rows


def _digest(content: Any, fields: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of plain values and tensors, with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, x in sorted((fields or {}).items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().numpy().data)
    return digest.hexdigest()
