"""Writing a teacher's outputs for a whole data set to a cache."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rkd.data.datasets.images import AugmentedSubset
from lightning_rkd.data.fingerprint import describe_dataset, describe_functions, find_views, without_addresses
from lightning_rkd.data.indexing import fetch_samples, find_root, get_collate
from lightning_rkd.data.samplers.pk import Draw
from lightning_rkd.distillation.layers import Layer
from lightning_rkd.distillation.teachers import cache_format as files
from lightning_rkd.distillation.teachers.cache_format import CacheError, CacheReader, DamagedError, Plan
from lightning_rkd.distillation.teachers.saved_state import plain_tensors
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.utils.distributed import Group, gather_objects, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.private import tree_leaves, tree_map
from lightning_rkd.utils.types import Batch, unpack

Dtype = Literal["float32", "float16"]
FIELDS = ("embedding", "logits")


def describe_layer(layer: Layer | None) -> str:
    """Description of a layer that is the same in every run."""
    if layer is None or isinstance(layer, str):
        return f"output of {layer!r}" if layer else "output"
    if isinstance(layer, Mapping | list):
        parts = layer.items() if isinstance(layer, Mapping) else enumerate(layer)
        return str({name: describe_layer(part) for name, part in parts})
    read = getattr(layer, "read", None)
    return without_addresses(repr(layer)) + (f" read by {without_addresses(repr(read))}" if read else "")


def describe_teacher(teacher: Teacher, layer: Layer | None) -> dict[str, str]:
    """Class of a network, checksum of the names and bytes of its tensors, its transform, and the layer to be read."""
    digest, network, skipped = hashlib.sha256(), teacher.network, teacher.trainable()
    for name, value in network.state_dict().items():
        if name in skipped:
            continue
        digest.update(name.encode())
        for x in (part for leaf in tree_leaves(value) if isinstance(leaf, Tensor) for part in plain_tensors(leaf)):
            plain = x.cpu().contiguous().reshape(-1)
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update((plain.int_repr() if x.is_quantized else plain).view(torch.uint8).numpy().data)
    return {
        "teacher network": f"{type(network).__module__}.{type(network).__qualname__}",
        "teacher weights": digest.hexdigest()[:32],
        "teacher transform": describe_functions(teacher.transforms),
        "teacher layer": describe_layer(layer),
    }


def write_cache(
    folder: Path,
    teacher: Teacher,
    layer: Layer | None,
    loader: DataLoader[Any],
    *,
    unpack: Callable[[Any], Batch] = unpack,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    shard_rows: int = 8192,
    overwrite: bool = False,
    group: Group = None,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> bool:
    """Write a teacher's embeddings and logits for every row of the root data set, and return whether any were missing.

    The rows have no augmentation, unless the loader's data set is an :class:`~lightning_rkd.data.AugmentedSubset` with
    a number of ``views``. Intact shards are kept, so that an interrupted run resumes; ``overwrite`` deletes them first.
    The ranks of a process group share the shards; the files are the same as from one process. ``progress`` is called
    after each shard with the number of finished rows and of all rows.
    """
    source, (rank, size) = _RootRows(loader), rank_and_size(group)

    def compute(rows: range, view: int = 0) -> dict[str, Tensor]:
        batch = unpack(source.batch(rows, view))
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
        taps = teacher.outputs(Batch(inputs))[0].features
        outputs = {f"{tap}/{field}": getattr(taps[tap], field) for tap in taps for field in FIELDS}
        return {name: x.cpu() for name, x in outputs.items() if x is not None and x.ndim == 2}

    def prepare() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (folder / files.MANIFEST, *folder.glob("rows-*.safetensors")) if rank == 0 else ():
                path.unlink(missing_ok=True)
            return False
        try:
            CacheReader(folder, plan)
        except (FileNotFoundError, DamagedError):
            return False
        return True

    def write_shards() -> bool:
        intact = True
        for number in range(rank, -(-source.rows // shard_rows), size):
            rows = range(source.rows)[number * shard_rows : (number + 1) * shard_rows]
            try:
                files.read_shard(folder, plan, number)
            except DamagedError:
                files.write_shard(folder, plan, number, _compute_shard(plan, rows, batch_size, compute))
                intact = False
            progress(rows.stop, source.rows)
        return intact

    teacher.attach(layer)
    try:
        teacher.to(device)
        fields = {name: x.shape[1] for name, x in sorted(compute(source.first).items())}
        if not fields:
            raise CacheError(
                "the teacher's layer gives nothing that can be cached, which is an embedding (N, D) or logits (N, K), "
                "not feature maps: name such a layer, teacher_layer=..., or Tap(layer, read=global_pool)"
            )
        plan: Plan = {"rows": source.rows, "views": source.views, "dtype": dtype, "shard_rows": shard_rows}
        plan |= {"fields": fields, **describe_teacher(teacher, layer)}
        plan |= {f"data {key}": text for key, text in describe_dataset(loader.dataset).items()}
        complete = run_on_all_ranks(prepare, group)
        complete = all(gather_objects(run_on_all_ranks(write_shards, group) and complete, group))
        run_on_all_ranks(lambda: None if complete or rank else files.write_manifest(folder, plan), group)
    finally:
        teacher.detach()
    return not complete


def _compute_shard(
    plan: Plan, rows: range, batch_size: int, compute: Callable[[range, int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    dtype = getattr(torch, plan["dtype"])
    out = {name: torch.empty(len(rows), plan["views"], width, dtype=dtype) for name, width in plan["fields"].items()}
    for view in range(plan["views"]):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            for name, x in compute(part, view).items():
                if len(x) != len(part):
                    raise CacheError(f"the teacher returned {len(x)} rows for {len(part)} samples")
                out[name][start : start + len(part), view] = kept = x.to(dtype)
                if len(bad := (~kept.isfinite()).any(1).nonzero()):
                    why = "does not fit into float16; use float32" if bool(x.isfinite().all()) else "is NaN or infinite"
                    raise CacheError(f"the teacher's {name.rpartition('/')[2]} of row {part[int(bad[0])]} {why}")
    return out


class _RootRows:
    """Batches of consecutive rows of the root data set behind a loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.rows, self.views = files.count_rows(loader), 1
        self.data, self.collate = find_root(loader.dataset), get_collate(loader)
        if (subset := find_views(loader.dataset)) is not None and subset.views is not None:
            self.views = subset.views
            self.data = AugmentedSubset(self.data, range(self.rows), subset.augment, subset.seed, subset.views)
        self.first = range(min(2, self.rows))
        once, twice = (tree_leaves(self.batch(self.first, 0)) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(once, twice, strict=True) if torch.is_tensor(a)):
            raise CacheError(
                f"the data set {type(find_root(loader.dataset)).__name__} returns different first rows each time and "
                "cannot be cached: use a deterministic transform, and augment for training afterwards"
            )

    def batch(self, rows: range, view: int) -> Any:
        return self.collate(fetch_samples(self.data, [Draw(row, view) for row in rows]))
