"""A cached teacher gives the outputs of the live one for the indices of a batch, or an error with the cure."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.data import Augment, AugmentedSubset, CentreCrop, ImageSet, MixUp, PKBatchSampler, Rotations
from lightning_rkd.data.fingerprint import describe_dataset
from lightning_rkd.data.indexing import IndexedBatch, with_indices
from lightning_rkd.distillation.layers import CaptureError, Tap
from lightning_rkd.distillation.teachers import (
    CachedTeacher,
    CacheError,
    EnsembleTeacher,
    Teacher,
    cached,
)
from lightning_rkd.distillation.teachers.cache_format import MANIFEST, shard_name
from lightning_rkd.distillation.teachers.cache_writer import describe_layer, write_cache
from lightning_rkd.losses.attention_transfer import AttentionTransfer
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.soft_target import SoftTarget
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.utils.types import Batch
from tests.harness import toys
from tests.harness.faces import FACES, User, gradients, largest, taught

ROWS = 8 * toys.STEPS
X = toys.Rows(ROWS).x
LABELS = toys.Rows(ROWS).y


def cache(path: Path, network: nn.Module | None = None, loader: Any = None, layer: Any = None, **how: Any) -> Path:
    """A folder with a network's outputs for the toy rows, in several shards."""
    batches = toys.loader() if loader is None else loader
    assert write_cache(path, Teacher(network or toys.teacher()), layer, batches, **{"shard_rows": 16, **how})
    return path


def read(teacher: CachedTeacher, rows: Any, epoch: int = 0) -> Tensor:
    features = teacher.outputs(Batch(None, indices=torch.as_tensor(rows), epoch=epoch))[0].features[""].embedding
    return features


def learn(face: str, teacher: Any, settings: dict[str, Any] | None = None, **fit: Any) -> list[list[Tensor]]:
    """The student's gradients of every step."""
    module, callbacks = taught(face, teacher, RKD(), **(settings or {}))
    return gradients(module, *callbacks, **fit)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float16", 2e-3)])
def test_gradients_are_those_of_the_live_teacher(face: str, dtype: str, allowed: float, tmp_path: Path) -> None:
    live, cached = learn(face, toys.teacher()), learn(face, CachedTeacher(cache(tmp_path, dtype=dtype)))
    assert largest(live[:1], cached[:1]) <= allowed
    assert largest(live[:1], learn(face, toys.teacher(seed=5))[:1]) > 4 * allowed
    if dtype == "float32":
        assert largest(live, cached) <= 1e-5


def test_embeddings_are_those_of_the_live_teacher(tmp_path: Path) -> None:
    network = toys.teacher()
    rows = torch.tensor([39, 0, 17, 16, 15, 0])
    expected = network.eval()(X)[rows].detach()
    assert float((read(CachedTeacher(cache(tmp_path, network)), rows) - expected).abs().max()) <= 1e-5
    half = read(CachedTeacher(cache(tmp_path / "half", network, dtype="float16")), rows)
    assert half.dtype == torch.float32
    assert 0 < float((half - expected).abs().max()) <= 2e-3 * float(expected.abs().max())


def test_logits_are_kept_beside_the_embedding_and_taps_by_name(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(toys.WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))
    layer: Any = {"body": "1", "head": Tap("2", at="classifier")}
    cached = CachedTeacher(cache(tmp_path, network, layer=layer))
    cached.attach(layer)
    features = cached.outputs(Batch(None, indices=torch.tensor([3, 20])))[0].features
    x = X[[3, 20]]
    torch.testing.assert_close(features["head"].logits, network(x))
    torch.testing.assert_close(features["head"].embedding, network[:2](x))
    torch.testing.assert_close(features["body"].embedding, network[:2](x))
    cached.check_loss("kd", SoftTarget())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_index_is_the_root_row_through_subsets_and_samplers(face: str, shuffle: bool, tmp_path: Path) -> None:
    root = TensorDataset(X, LABELS)
    part = Subset(Subset(root, range(39, 3, -1)), range(4, 28))

    def batches() -> dict[str, Any]:
        sampler: dict[str, Any] = {"batch_size": 8}
        if shuffle:
            sampler = {"batch_sampler": PKBatchSampler(torch.arange(24) % 6, 3, 2, seed=3)}
        return {"batches": DataLoader(part, **sampler), "use_distributed_sampler": False}

    cached = CachedTeacher(cache(tmp_path, loader=DataLoader(root, batch_size=7)))
    assert largest(learn(face, toys.teacher(), **batches()), learn(face, cached, **batches())) <= 1e-5


@pytest.mark.parametrize("face", FACES)
def test_a_missing_cache_is_written_before_the_first_step(face: str, tmp_path: Path) -> None:
    cached = learn(face, CachedTeacher(tmp_path, toys.teacher()))
    assert largest(learn(face, toys.teacher()), cached) <= 1e-5
    assert (tmp_path / MANIFEST).exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert largest(learn(face, CachedTeacher(tmp_path, toys.teacher())), cached) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(CacheError, match="teacher weights: cached"):
        learn(face, CachedTeacher(tmp_path, toys.teacher(seed=8)))


def pictures(views: int | None = None) -> AugmentedSubset:
    images = torch.randint(256, (24, 1, 6, 6), generator=torch.Generator().manual_seed(1)).byte()
    root = ImageSet(images, torch.arange(24) % 6)
    return AugmentedSubset(root, range(4, 24), Augment(rotation=30, shift=0.2), seed=2, views=views)


def flat() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 7))


def test_views_are_those_of_training_epoch_by_epoch(tmp_path: Path) -> None:
    data, network = pictures(views=2), flat()
    loader = DataLoader(data, batch_sampler=PKBatchSampler(torch.arange(20) % 5, 5, 6))  # with repeated rows
    cached = CachedTeacher(cache(tmp_path, network, loader))
    seen = []
    for epoch in range(4):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for batch in with_indices(loader):
            features = read(cached, batch.indices, batch.epoch)
            torch.testing.assert_close(features, network(batch.batch[0]), atol=1e-5, rtol=0)
            seen.append(batch.batch[0].sort(0).values)
    assert not torch.equal(seen[0], seen[1])


def test_a_single_view_is_of_the_images_without_augmentation(tmp_path: Path) -> None:
    data, network = pictures(), flat()
    cached = CachedTeacher(cache(tmp_path, network, DataLoader(data, batch_size=4)))
    plain = torch.stack([x for x, _ in (data.dataset[i] for i in range(24))])
    torch.testing.assert_close(read(cached, range(24)), network(plain))


@pytest.mark.parametrize("transform", [MixUp(), Rotations()])
def test_batch_transforms_are_refused(transform: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"batch_transform={type(transform).__name__} .* Teacher\(network\)"):
        learn("module", CachedTeacher(cache(tmp_path)), {"batch_transform": transform})


@pytest.mark.parametrize("same", [True, False])
def test_metrics_compare_with_it_on_the_same_root_only(same: bool, tmp_path: Path) -> None:
    metrics = {"kept": RelationalAgreement()}
    module, _ = taught("module", CachedTeacher(cache(tmp_path)), RKD(), metrics=metrics)
    other = TensorDataset(X if same else X + 1, LABELS)
    validation = with_indices(DataLoader(Subset(other, range(20, 40)), batch_size=10))
    trainer = toys.trainer()
    if same:
        trainer.fit(module, toys.loader(), validation)
        assert any(name.startswith("val/") for name in trainer.callback_metrics)
    else:
        with pytest.raises(CacheError, match="data content: cached"):
            trainer.fit(module, toys.loader(), validation)


@pytest.mark.parametrize("face", FACES)
def test_another_data_set_is_refused_by_name_of_what_differs(face: str, tmp_path: Path) -> None:
    path = cache(tmp_path)
    others: dict[str, Any] = {
        "length": TensorDataset(X[:32], LABELS[:32]),
        "content": TensorDataset(X + 1, LABELS),
        "class": ConcatDataset([TensorDataset(X, LABELS)]),
    }
    for part, other in others.items():
        with pytest.raises(CacheError, match=f"data {part}: cached"):
            learn(face, CachedTeacher(path), batches=DataLoader(other, batch_size=8))
    batches = DataLoader(others["content"], batch_size=8)
    learn(face, CachedTeacher(path, ignore=["class", "content"]), batches=batches)
    with pytest.raises(CacheError, match=r"teacher layer: cached 'output', now \"output of '0'\""):
        learn(face, CachedTeacher(path), {"teacher_layer": "0"})


def test_the_description_of_the_data_has_augmentation_and_transform() -> None:
    data, described = pictures(views=2), []
    for name, value in (("seed", 2), ("seed", 3), ("transform", CentreCrop(4))):
        setattr(data if name == "seed" else data.dataset, name, value)
        described.append(describe_dataset(data))
    for a, b, part in zip(described, described[1:], ("augmentation", "transform"), strict=False):
        assert [key for key in a if a[key] != b[key]] == [part]


def test_ranks_with_different_caches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "gather_objects", lambda fingerprint, group=None: [fingerprint, "another"])
    for teacher in (CachedTeacher(cache(tmp_path)), CachedTeacher.from_array(X)):
        with pytest.raises(RuntimeError, match=r"the caches .* of the ranks differ \(.*'another'\]\): copy one"):
            learn("callback", teacher)


PAIR = str({0: "output of 'a'", 1: "output of 'b'"})


def test_the_description_of_a_layer_is_the_same_in_every_run() -> None:
    def described(function: Any) -> str:
        return describe_layer({"x": Tap("a", read=lambda output, arguments: output), "y": ["b", Tap(function)]})

    assert described(len) == described(len) != described(max)
    assert "at 0x" not in described(lambda network: network.body)
    assert [describe_layer(layer) for layer in (None, "a.b", ["a", "b"])] == ["output", "output of 'a.b'", PAIR]
    assert describe_layer(Tap("a", read=len)) != describe_layer(Tap("a", read=max)) != describe_layer(Tap("a"))


class Jitters(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.rand(toys.WIDTH), 0


class Streams(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def outputs(path: Path, *arguments: Any, **batch: Any) -> Any:
    return CachedTeacher(cache(path)).outputs(Batch(None, **batch), *arguments)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no cache": (lambda p: read(CachedTeacher(p), [0]), "missing or incomplete. Write it with lightning-rkd cache"),
    "too large an index": (lambda p: read(CachedTeacher(cache(p)), [0, 40]), r"index 40, .* rows 0 to 39"),
    "a negative index": (lambda p: read(CachedTeacher(cache(p)), [0, -1]), "has the index -1"),
    "no indices": (outputs, r"with_indices\(loader\)"),
    "input_layer": (lambda p: outputs(p, [1]), "leave input_layer out"),
    **{
        f"a batch with {changed}": (
            lambda p, changed=changed: outputs(p, indices=torch.ones(2).long(), **{changed: torch.ones(2)}),
            "leave the batch_transform out",
        )
        for changed in ("view", "mix")
    },
    "a loss of maps": (
        lambda p: CachedTeacher(p).check_loss("at", AttentionTransfer()),
        r"reads \['feature_maps'\], but a cached teacher holds embeddings and logits",
    ),
    "random data": (lambda p: cache(p, loader=DataLoader(Jitters())), "Jitters returns different first rows"),
    "streams": (lambda p: cache(p, loader=DataLoader(Streams())), "map-style data set .*, got Streams"),
    "feature_maps": (lambda p: cache(p, Computes(lambda x: x[:, None, None])), r"an embedding \(N, D\) or logits"),
    "other rows": (lambda p: cache(p, Computes(lambda x: x[:1])), "returned 1 rows for 16 samples"),
    "NaN": (lambda p: cache(p, Computes(lambda x: x * torch.nan)), "row 0 is NaN or infinite"),
    "overflow": (
        lambda p: cache(p, Computes(lambda x: x * 1e9), dtype="float16"),
        "does not fit into float16; use float32",
    ),
    "an unknown part": (lambda p: CachedTeacher(p, ignore=["length"]), "ignore may name"),
    "an unknown dtype": (lambda p: CachedTeacher(p, dtype="int8"), "'float32' or 'float16', got 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cached_or_read_is_refused_with_the_cure(case: str, tmp_path: Path) -> None:
    call, message = REFUSED[case]
    with pytest.raises((ValueError, OSError, CaptureError), match=message):
        call(tmp_path)


def test_no_damaged_file_is_read_in_silence_and_a_run_repairs_it(tmp_path: Path) -> None:
    path, rng = cache(tmp_path), np.random.default_rng(0)
    good = read(CachedTeacher(path), range(ROWS))
    for victim in (shard_name(1), MANIFEST):
        whole = (path / victim).read_bytes()
        for trial in range(60):
            damaged = bytearray(whole)
            at = rng.integers(len(whole)) if trial > 1 else whole.rindex(b"/embedding") + 3  # the name of a field
            damaged[at] ^= 1 << rng.integers(8)
            (path / victim).write_bytes(damaged if trial % 3 else whole[: rng.integers(len(whole))])
            with pytest.raises(CacheError, match=f"{re.escape(victim)}.*lightning-rkd cache"):
                read(CachedTeacher(path), range(ROWS))
            if trial < 15:
                cache(path)
                assert (path / victim).read_bytes() == whole
        (path / victim).write_bytes(whole)
    assert torch.equal(read(CachedTeacher(path), range(ROWS)), good)


def test_a_missing_shard_and_one_of_another_cache_are_named(tmp_path: Path) -> None:
    path, other = cache(tmp_path / "a"), cache(tmp_path / "b", toys.teacher(seed=9))
    teacher = CachedTeacher(path)
    (path / shard_name(2)).unlink()
    read(teacher, [0])
    with pytest.raises(CacheError, match=r"rows-00002\.safetensors' is missing"):
        read(teacher, [32])
    for source, difference in (
        (other / shard_name(2), "teacher weights: cached"),
        (path / shard_name(1), "shard: .* 1"),
    ):
        (path / shard_name(2)).write_bytes(source.read_bytes())
        with pytest.raises(CacheError, match=rf"rows-00002\.safetensors' was made for something else: {difference}"):
            read(teacher, [32])


def test_copies_and_pickles_hold_the_path_and_no_rows(tmp_path: Path) -> None:
    teacher = CachedTeacher(cache(tmp_path))
    expected = read(teacher, [5, 30])
    for twin in (copy.deepcopy(teacher), copy.copy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert twin._reader is None
        assert torch.equal(read(twin, [5, 30]), expected)
    np.save(tmp_path / "rows.npy", np.zeros((5000, 64), dtype="float32"))
    assert len(pickle.dumps(CachedTeacher.from_array(tmp_path / "rows.npy"))) < 5000


def stored(kind: str, x: Tensor, folder: Path) -> Any:
    path = folder / f"x.{kind}"
    if kind == "npy":
        np.save(path, x.numpy())
    if kind == "safetensors":
        save_file({"x": x}, path)
    return {"tensor": x, "numpy": x.numpy(), "npy": path, "safetensors": str(path)}[kind]


@pytest.mark.parametrize("kind", ["tensor", "numpy", "npy", "safetensors"])
@pytest.mark.parametrize("face", FACES)
def test_embeddings_from_elsewhere_teach_as_the_network_would(kind: str, face: str, tmp_path: Path) -> None:
    x = toys.teacher().eval()(X).detach()
    live = learn(face, toys.teacher())
    assert largest(live, learn(face, CachedTeacher.from_array(stored(kind, x, tmp_path)))) <= 1e-5
    order = torch.randperm(ROWS)
    mixed = CachedTeacher.from_array(stored(kind, x[order].contiguous(), tmp_path), ids=order.tolist())
    assert largest(live, learn(face, mixed)) <= 1e-5
    assert torch.equal(read(pickle.loads(pickle.dumps(mixed)), [7, 3]), x[[7, 3]])


def test_a_safetensors_file_may_hold_the_ids_and_any_float_type(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({"x": x.to(dtype), "ids": torch.tensor([7, 0, 5])}, tmp_path / "x.safetensors")
        features = read(CachedTeacher.from_array(tmp_path / "x.safetensors"), [5, 7])
        assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(features, x[[2, 0]].to(dtype).to(features.dtype))
    np.save(tmp_path / "ids.npy", [7, 0, 5])
    assert torch.equal(read(CachedTeacher.from_array(x, tmp_path / "ids.npy"), [5]), x[[2]])


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"39 rows without ids, but the root data set has 40: pass ids"):
        learn("callback", CachedTeacher.from_array(torch.randn(39, 4)))
    few = CachedTeacher.from_array(torch.randn(3, 4), ids=[5, 9, 700])
    for unknown in (8, 701, -1):
        with pytest.raises(CacheError, match=f"index {unknown}, but there is no embedding"):
            read(few, [5, unknown])
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    np.save(tmp_path / "objects.npy", np.array([[1.0, 2.0]], object), allow_pickle=True)
    wrong: list[tuple[Any, Any, str]] = [
        (torch.arange(6).view(3, 2), None, r"floating point \(N, D\), got torch.int64"),
        (torch.randn(3), None, r"floating point \(N, D\)"),
        (torch.randn(3, 2), [1, 2], "ids must be 3 integers"),
        (torch.randn(3, 2), [1, 2, 1], "the id 1 is given twice"),
        (tmp_path / "cut.npy", None, r"cut\.npy' cannot be read"),
        (tmp_path / "objects.npy", None, r"objects\.npy' are Python objects: save np.stack"),
        (tmp_path / "cut.safetensors", None, r"cut\.safetensors' cannot be read"),
        (tmp_path / "none.npy", None, "do not exist"),
        (5, None, "takes a tensor, an array or a path, got int"),
    ]
    for array, ids, message in wrong:
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            CachedTeacher.from_array(array, ids)


@pytest.mark.parametrize("face", FACES)
def test_an_ensemble_may_hold_cached_and_live_teachers(face: str, tmp_path: Path) -> None:
    live = EnsembleTeacher([toys.teacher(), toys.teacher(seed=4)])
    mixed = EnsembleTeacher([CachedTeacher(cache(tmp_path)), toys.teacher(seed=4)])
    assert largest(learn(face, live), learn(face, mixed)) <= 1e-5


def test_user_code_never_sees_indexed_batches(tmp_path: Path) -> None:
    kinds = []

    class Records(User):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            kinds.append(type(batch))
            return super().training_step(batch, batch_idx)

    callback = RelationalDistillation(CachedTeacher(cache(tmp_path)), RKD(), student_layer="backbone")
    trainer = toys.fit(Records(), callback)
    assert IndexedBatch not in kinds
    assert "dataloader" not in vars(trainer.fit_loop._data_source), "the loader is restored"


def on_two_ranks(rank: int, folder: str) -> None:
    for new in (True, False):
        assert write_cache(Path(folder), Teacher(toys.teacher()), None, toys.loader(), shard_rows=8) is new


def test_two_ranks_write_the_files_of_one(ranks: Any, tmp_path: Path) -> None:
    ranks.run(on_two_ranks, str(tmp_path / "two"))
    cache(tmp_path / "one", shard_rows=8)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert json.loads(one[MANIFEST])["rows"] == ROWS
