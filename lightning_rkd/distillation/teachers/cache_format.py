"""Rows on disk: safetensors shards with a manifest, written whole, verified before they are read, memory-mapped.

``manifest.json`` says what is in the folder (the *plan*) and the SHA-256 of every shard; it is written last and carries
a checksum of its own. ``rows-00000.safetensors`` and so on hold ``shard_rows`` consecutive rows each, one tensor
(rows, views, width) for each field. Every shard repeats the plan, so that an interrupted cache can be gone on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from lightning_rkd.utils.files import write_whole

MANIFEST = "manifest.json"
Plan = dict[str, Any]
"""``rows``, ``views``, ``dtype``, ``shard_rows``, ``fields`` (name -> width), ``teacher``, ``data`` (name -> words)."""


class CacheError(ValueError):
    """A cache that is damaged, unfinished, or made for something else."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"rows-{number:05d}.safetensors"


def shard_count(plan: Plan) -> int:
    """How many shards a plan asks for."""
    return -(-int(plan["rows"]) // int(plan["shard_rows"]))


def shard_range(plan: Plan, number: int) -> range:
    """The rows in a shard."""
    first = number * int(plan["shard_rows"])
    return range(first, min(first + int(plan["shard_rows"]), int(plan["rows"])))


def write_shard(folder: Path, plan: Plan, number: int, fields: Mapping[str, Tensor]) -> None:
    """Write one shard, whole or not at all.

    Raises:
        OSError: The disk is full, or something else kept it from being written.
    """
    write_whole(folder / shard_name(number), _content(plan, number, fields))


def shard_is_sound(folder: Path, plan: Plan, number: int) -> bool:
    """Whether a shard is there, belongs to the plan, and is exactly what was written.

    Raises:
        CacheError: It belongs to another plan; the message says what differs.
    """
    path = folder / shard_name(number)
    if not path.exists():
        return False
    found = path.read_bytes()
    try:
        header = json.loads(found[8 : 8 + int.from_bytes(found[:8], "little")])["__metadata__"]["rkd"]
        own = json.loads(header)
        fields = load(found)
    except Exception:  # whatever a damaged header makes of itself
        return False
    if _digest(fields) != own.get("sha256"):
        return False
    refuse_other(own["plan"], plan, path)
    return _content(plan, number, fields) == found


def refuse_other(found: Plan, wanted: Plan, path: Path) -> None:
    """Compare two plans.

    Raises:
        CacheError: With every part that differs.
    """
    if differing := differences(found, wanted):
        raise CacheError(
            f"the cache {str(path)!r} was made for something else: {'; '.join(differing)}. Name another folder, or "
            "write it anew: lightning-rkd cache --overwrite"
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two nested mappings, in words.

    Example:
        >>> differences({"data": {"length": "5"}}, {"data": {"length": "6"}})
        ["data length: cached '5', now '6'"]
    """
    said = []
    for key in sorted({*found, *wanted}):
        a, b, name = found.get(key), wanted.get(key), f"{where}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            said += differences(a, b, f"{name} ")
        elif a != b:
            said.append(f"{name}: cached {a!r}, now {b!r}")
    return said


def write_manifest(folder: Path, plan: Plan) -> None:
    """Write down the checksums of all shards; from now on the cache is there."""
    shards = {}
    for number in range(shard_count(plan)):
        with (folder / shard_name(number)).open("rb") as file:
            shards[shard_name(number)] = hashlib.file_digest(file, "sha256").hexdigest()
    content = {"plan": plan, "shards": shards}
    text = json.dumps({**content, "sha256": _of(content)}, indent=1, sort_keys=True)
    write_whole(folder / MANIFEST, text.encode())


class Shards:
    """A finished cache, to_batch for reading.

    The manifest is verified at once, a shard when its first row is asked for (which reads it once) and never again;
    after that only the pages of the rows that are asked for are read.

    Args:
        folder: Where ``manifest.json`` lies.

    Raises:
        FileNotFoundError: There is no manifest.
        CacheError: It is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            begun = any(folder.glob("rows-*.safetensors"))
            raise FileNotFoundError(
                f"{str(path)!r} does not exist: the cache is {'not finished' if begun else 'not there'}. Write it with "
                f"lightning-rkd cache --config RECIPE --out {folder}"
            )
        try:
            content = json.loads(path.read_bytes())
            own = content.pop("sha256")
            if own != _of(content):
                raise ValueError("its checksum is not that of its content")
            self.plan: Plan = content["plan"]
            self.sums: dict[str, str] = content["shards"]
            if len(self.sums) != shard_count(self.plan):
                raise ValueError(f"it names {len(self.sums)} shards instead of {shard_count(self.plan)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"the manifest {str(path)!r} is damaged ({error}); lightning-rkd cache, given as "
                "before, writes it again and keeps the sound shards"
            ) from error
        self.fingerprint: str = own
        self._open: dict[int, dict[str, Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows of the root data set."""
        return int(self.plan["rows"])

    @property
    def views(self) -> int:
        """Views of every row."""
        return int(self.plan["views"])

    def located(self, indices: Tensor) -> Tensor:
        """The rows with these indices: they themselves.

        Raises:
            CacheError: There is no such row.
        """
        return within(indices, self.rows, f"the cache {str(self.folder)!r}")

    def read(self, rows: Tensor, view: int = 0) -> dict[str, Tensor]:
        """One tensor (N, width) for each field, in float32.

        Args:
            rows: (N,) int64 on the CPU, each within the cache.
            view: Which view, from 0.

        Raises:
            CacheError: A shard is missing, damaged, or belongs to another cache.
        """
        size = int(self.plan["shard_rows"])
        if shard_count(self.plan) == 1:
            return {name: _rows(x[:, view], rows) for name, x in self.shard(0).items()}
        number = rows.div(size, rounding_mode="floor")
        out = {name: torch.empty(len(rows), width) for name, width in self.plan["fields"].items()}
        for shard in torch.unique(number).tolist():
            (here,) = torch.nonzero(number == shard, as_tuple=True)
            for name, x in self.shard(shard).items():
                out[name][here] = _rows(x[:, view], rows[here] - shard * size)
        return out

    def shard(self, number: int) -> dict[str, Tensor]:
        """The memory-mapped tensors of a shard, verified."""
        if number not in self._open:
            self._open[number] = self._verified(number)
        return self._open[number]

    def is_sound(self, number: int) -> bool:
        """Whether a shard is exactly what was written; reads it."""
        try:
            self._verified(number)
        except CacheError:
            return False
        return True

    def _verified(self, number: int) -> dict[str, Tensor]:
        path = self.folder / shard_name(number)
        cure = "; lightning-rkd cache, given as before, writes it again and keeps the sound ones"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise CacheError(f"the shard {str(path)!r} is missing{cure}") from None
        if found != self.sums[path.name]:
            raise CacheError(f"the shard {str(path)!r} {self._what_is_wrong(path)}{cure}")
        with safetensors.safe_open(path, framework="pt") as to_batch:
            return {name: to_batch.get_tensor(name) for name in self.plan["fields"]}

    def _what_is_wrong(self, path: Path) -> str:
        try:
            with safetensors.safe_open(path, framework="pt") as to_batch:
                own = json.loads(to_batch.metadata()["rkd"])
        except Exception:
            return "is damaged or cut short: its SHA-256 is not that in the manifest"
        if own["plan"] != self.plan:
            return f"belongs to another cache ({'; '.join(differences(own['plan'], self.plan))})"
        return "is damaged: its SHA-256 is not that in the manifest"


def within(indices: Tensor, rows: int, what: str) -> Tensor:
    """The same indices, if all of them are rows.

    Raises:
        CacheError: One is not.
    """
    if len(indices):
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= rows:
            raise CacheError(f"the batch asks for row {low if low < 0 else high}, and {what} has rows 0 to {rows - 1}")
    return indices


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows).float()


def _content(plan: Plan, number: int, fields: Mapping[str, Tensor]) -> bytes:
    about = {"plan": plan, "number": number, "sha256": _digest(fields)}
    # one entry: the order of several is not kept
    return save(dict(fields), metadata={"rkd": json.dumps(about, sort_keys=True)})


def _digest(fields: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(fields):
        digest.update(name.encode())
        digest.update(fields[name].contiguous().numpy().data)
    return digest.hexdigest()


def _of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
