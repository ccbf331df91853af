"""Runs a teacher over a whole data set and keeps what it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_rkd.data.datasets.images import AugmentedSubset
from lightning_rkd.data.fingerprint import augmented, describe, without_addresses
from lightning_rkd.data.indexing import plain_collate, root_of, root_size
from lightning_rkd.data.samplers.pk import Draw
from lightning_rkd.distillation.features import Layer
from lightning_rkd.distillation.teachers import cache_format as shards
from lightning_rkd.distillation.teachers.cache_format import CacheError, Plan
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.utils.distributed import Group, gather_objects, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs, unpack

Dtype = Literal["float32", "float16"]


def describe_layer(layer: Layer | None) -> str:
    """A layer in words, the same from run to run.

    Example:
        >>> describe_layer(None), describe_layer("backbone.fc")
        ('output', 'backbone.fc')
    """
    if layer is None or isinstance(layer, str):
        return "output" if layer is None else layer
    if isinstance(layer, Mapping):
        return str({name: describe_layer(part) for name, part in layer.items()})
    if isinstance(layer, list):
        return str([describe_layer(part) for part in layer])
    read = getattr(layer, "read", None)
    return without_addresses(repr(layer)) + (f" read by {without_addresses(repr(read))}" if read else "")


def describe_teacher(network: nn.Module, layer: Layer | None) -> dict[str, str]:
    """A network in words: its class, a checksum of the names and bytes of its tensors, and where it is read."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        for x in tree_leaves(value):
            if isinstance(x, Tensor):
                plain = x.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
                digest.update((plain.int_repr() if x.is_quantized else plain).view(torch.uint8).numpy().data)
    kind = type(network)
    return {
        "network": f"{kind.__module__}.{kind.__qualname__}",
        "weights": digest.hexdigest()[:32],
        "layer": describe_layer(layer),
    }


def cacheable(shown: Mapping[str, Outputs]) -> dict[str, Tensor]:
    """The rows that can be kept: embeddings (N, D) and logits (N, K), as ``<tap>/<field>``.

    Raises:
        CacheError: There are none.
    """
    fields = {
        f"{tap}/{name}": x
        for tap, outputs in shown.items()
        for name in ("embedding", "logits")
        if (x := getattr(outputs, name)) is not None and x.ndim == 2
    }
    if not fields:
        raise CacheError(
            "the teacher shows nothing that can be cached at its layer: that is an embedding (N, D) or logits (N, K), "
            "and no feature maps; name such a layer, teacher_layer=..., or Tap(layer, read=global_pool)"
        )
    return fields


def fill(
    folder: Path,
    teacher: Teacher,
    layer: Layer | None,
    loader: DataLoader[Any],
    *,
    to_batch: Callable[[Any], Batch] = unpack,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    shard_rows: int = 8192,
    overwrite: bool = False,
    verify: bool = True,
    group: Group = None,
    advance: Callable[[int, int], None] = lambda done, rows: None,
) -> bool:
    """Write what an attached teacher shows for every row of the root data set behind a loader.

    The rows are read as the root data set gives them, without the augmentation of a training subset; except where the
    training set is an :class:`~lightning_rkd.data.AugmentedSubset` with a number of ``views``: then view v is
    what it shows in epoch v. Sampler and batch size of the loader play no part, its ``collate_fn`` does.

    Shards that are there already and sound are kept. In a process group ranks write shards by turns; the files are
    the same.

    Args:
        folder: Where the cache goes.
        teacher: On its device.
        layer: Where it is attached.
        loader: The training loader.
        to_batch: From what the loader yields to a batch.
        dtype: How numbers are kept.
        device: Where the teacher is.
        batch_size: Rows that the teacher sees at once.
        shard_rows: Rows in a file; an interrupted run goes on at the file it was at.
        overwrite: Whether to begin anew, whatever is there.
        verify: Whether to read a finished cache again, and to write damaged files anew.
        group: Process group.
        advance: Called with the rows done by this rank, and all rows.

    Returns:
        Whether there was anything to do.

    Raises:
        CacheError: The folder holds another cache, or the data set or teacher cannot be cached.
        OSError: The disk is full.
    """
    data, rank_size = _Rows(loader), rank_and_size(group)
    first, again = data.batch(range(min(2, data.rows)), 0), data.batch(range(min(2, data.rows)), 0)
    if not all(
        torch.equal(a, b) for a, b in zip(tree_leaves(first), tree_leaves(again), strict=True) if torch.is_tensor(a)
    ):
        raise CacheError(
            f"the data set {type(root_of(loader.dataset)).__name__} shows its first rows differently each time, so "
            "what a teacher shows of them cannot be kept: cache with a transform that draws nothing, and augment for "
            "training afterwards"
        )

    def shown(batch: Any) -> dict[str, Tensor]:
        inputs = _moved(to_batch(batch), device)
        (lesson,) = teacher.lessons(inputs)
        return {name: x.cpu() for name, x in cacheable(lesson.shown).items()}

    plan: Plan = {
        "format": 1,
        "rows": data.rows,
        "views": data.views,
        "dtype": dtype,
        "shard_rows": shard_rows,
        "fields": {name: x.shape[1] for name, x in sorted(shown(first).items())},
        "teacher": describe_teacher(teacher.network, layer),
        "data": describe(loader.dataset),
    }
    run_on_all_ranks(partial(_prepare, folder, plan, overwrite, rank_size[0] == 0), group)
    if run_on_all_ranks(partial(_finished, folder, verify), group):
        return False
    run_on_all_ranks(partial(_write_shards, folder, plan, data, rank_size, batch_size, shown, advance), group)
    if rank_size[0] == 0:
        shards.write_manifest(folder, plan)
    gather_objects(None, group)
    return True


def _write_shards(
    folder: Path,
    plan: Plan,
    data: _Rows,
    rank_size: tuple[int, int],
    batch_size: int,
    shown: Callable[[Any], dict[str, Tensor]],
    advance: Callable[[int, int], None],
) -> None:
    """Write those shards of this rank that are not there or not sound."""
    done = 0
    for number in range(rank_size[0], shards.shard_count(plan), rank_size[1]):
        rows = shards.shard_range(plan, number)
        if not shards.shard_is_sound(folder, plan, number):
            shards.write_shard(folder, plan, number, _shard(data, rows, plan, batch_size, shown))
        done += len(rows)
        advance(done, data.rows)


def _prepare(folder: Path, plan: Plan, overwrite: bool, first: bool) -> None:
    """Make the folder, and look whether what is in it may stay."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / shards.MANIFEST
    if overwrite and first:
        manifest.unlink(missing_ok=True)
        for path in folder.glob("rows-*.safetensors"):
            path.unlink()
    if not overwrite and (there := _manifest(folder)) is not None:
        shards.refuse_other(there.plan, plan, folder)


def _finished(folder: Path, verify: bool) -> bool:
    there = _manifest(folder)
    return there is not None and (not verify or all(map(there.is_sound, range(shards.shard_count(there.plan)))))


def _manifest(folder: Path) -> shards.Shards | None:
    """What is there; a damaged manifest is as good as none, for every shard says what it belongs to."""
    try:
        return shards.Shards(folder)
    except (FileNotFoundError, CacheError):
        return None


def _shard(
    data: _Rows, rows: range, plan: Plan, batch_size: int, shown: Callable[[Any], dict[str, Tensor]]
) -> dict[str, Tensor]:
    kind = getattr(torch, plan["dtype"])
    out = {name: torch.empty(len(rows), data.views, width, dtype=kind) for name, width in plan["fields"].items()}
    for view in range(data.views):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            for name, x in shown(data.batch(part, view)).items():
                if len(x) != len(part):
                    raise CacheError(f"the teacher shows {len(x)} rows for {len(part)} samples")
                kept = x.to(kind)
                if not bool(kept.isfinite().all()):
                    bad = part[int((~kept.isfinite()).any(1).nonzero()[0])]
                    why = "does not fit into float16; use float32" if bool(x.isfinite().all()) else "is NaN or infinite"
                    raise CacheError(f"what the teacher shows for row {bad} {why}")
                out[name][start : start + len(part), view] = kept
    return out


class _Rows:
    """The rows of the root data set behind a loader, in batches as the loader would make them."""

    def __init__(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader) or root_size(loader.dataset) is None:
            raise CacheError(
                f"a cache needs one DataLoader over a map-style data set, whose rows have numbers; got "
                f"{type(loader).__name__}"
            )
        self.root, self.collate = root_of(loader.dataset), plain_collate(loader)
        self.rows, self.views, self.augmented = len(self.root), 1, False
        subset = augmented(loader.dataset)
        if subset is not None and subset.views is not None:
            everything = range(self.rows)
            self.root = AugmentedSubset(subset.dataset, everything, subset.augment, subset.seed, subset.views)
            self.views, self.augmented = subset.views, True

    def batch(self, rows: range, view: int) -> Any:
        indices = [Draw(row, view) if self.augmented else row for row in rows]
        fetch = getattr(self.root, "__getitems__", None)
        return self.collate(fetch(indices) if fetch else [self.root[i] for i in indices])


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    return Batch(tree_map(move, batch.inputs), teacher_inputs=tree_map(move, batch.teacher_inputs))
