import io
import logging
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import DistillationModule
from lightning_rkd.data import (
    CarsDataModule,
    CIFARDataModule,
    CUBDataModule,
    ImageDataModule,
    ImageFiles,
    InShopDataModule,
    MiniImageNetDataModule,
    OmniglotDataModule,
    OnlineProductsDataModule,
    TinyImageNetDataModule,
)
from lightning_rkd.data.datamodules import cifar, cub, omniglot
from lightning_rkd.data.fingerprint import describe_dataset
from lightning_rkd.metrics import EmbeddingRetrieval
from lightning_rkd.models import ConvNet
from lightning_rkd.utils.types import QuerySample, unpack
from tests.harness import toys
from tests.harness.replicas import number_of, replica, shade

REAL = Path(__file__).parents[4] / "shared" / "data"

MODULES: dict[str, Any] = {
    "cars": CarsDataModule,
    "cars_devkit": CarsDataModule,
    "cifar10": partial(CIFARDataModule, classes=10),
    "cifar100": CIFARDataModule,
    "cub": CUBDataModule,
    "in_shop": InShopDataModule,
    "mini_imagenet": MiniImageNetDataModule,
    "online_products": OnlineProductsDataModule,
    "tiny_imagenet": TinyImageNetDataModule,
}
every_data_set = pytest.mark.parametrize("name", [*MODULES, "omniglot"])


def module(name: str, folder: Path, **settings: Any) -> Any:
    root = folder if folder.exists() else replica(name, folder)
    sizes = {} if name.startswith("cifar") else {"image_size": 24, "crop_size": 16}
    made = MODULES[name](root, check=False, classes_per_batch=2, samples_per_class=3, **(sizes | settings))
    made.setup()
    return made


def classes_of(data: ImageDataModule, part: str) -> set[int]:
    rows = torch.tensor(getattr(data, f"{part}_set").indices)
    offset = 1 if isinstance(data, OnlineProductsDataModule) else 0  # these are numbered from 1
    return {number_of(data.class_names[c]) - offset for c in data.root.labels[rows].tolist()}


@pytest.mark.parametrize("name", MODULES)
def test_every_image_has_the_label_of_its_class_and_parts_share_none(name: str, tmp_path: Path) -> None:
    data = module(name, tmp_path / "data")
    offset = 1 if name == "online_products" else 0
    known = (data.root.labels >= 0).nonzero().flatten()
    seen = (data.root.pixels(known)[:, 0].mean((1, 2)) * 255).round()
    expected = [shade(number_of(data.class_names[c]) - offset) for c in data.root.labels[known].tolist()]
    assert ((seen - torch.tensor(expected)).abs() <= 2).all()  # JPEG
    train, val, test = (classes_of(data, part) for part in ("train", "val", "test"))
    if name == "mini_imagenet":
        assert (train, val, test) == (set(range(4, 8)), set(range(4)), set(range(8, 12)))
    else:
        assert (train | val, test) == (set(range(6)), set(range(6, 12)))
        assert len(val) == 2
        assert not train & val
    x, y = next(iter(data.train_dataloader()))
    size = 32 if name.startswith("cifar") else 16
    assert x.shape == (6, 3, size, size)
    assert sorted(Counter(y.tolist()).values()) == [3, 3]
    assert next(iter(data.test_dataloader())).batch[0].shape[1:] == data.image_shape == (3, size, size)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "cub", "cars", "cars_devkit"])
def test_classification_tests_on_the_official_test_images(name: str, tmp_path: Path) -> None:
    data = module(name, tmp_path / "data", split_by="samples", validation=0.2)
    assert data.num_train_classes == 12
    assert classes_of(data, "test") == classes_of(data, "train") == set(range(12))
    tests = {"cub": 2}.get(name, 3)
    assert len(data.test_set) == 12 * tests
    if name in ("cifar100", "tiny_imagenet"):
        assert min(data.test_set.indices) == 12 * 6 > max(data.train_set.indices)


def test_retrieval_on_cifar_tests_with_test_images(tmp_path: Path) -> None:
    data = module("cifar100", tmp_path / "data")
    assert data.test_set.indices == list(range(12 * 6 + 6 * 3, 12 * 6 + 12 * 3))
    assert max(data.val_set.indices + data.train_set.indices) < 6 * 6


def test_validation_0_holds_no_class_out(tmp_path: Path) -> None:
    data = module("cub", tmp_path / "data", validation=0)
    assert classes_of(data, "train") == set(range(6))
    assert data.val_dataloader() == []
    assert len(module("cifar100", tmp_path / "other", validation=0, split_by="samples").train_set) == 72


def test_images_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    disk = module("cub", tmp_path / "data", num_workers=2)
    memory = module("cub", tmp_path / "data", in_memory=True)
    assert isinstance(disk.root.images, ImageFiles)
    assert disk.root.images.shape == memory.root.images.shape == (72, 3, 24, 24)
    for a, b in zip(disk.train_dataloader(), memory.train_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert torch.equal(disk.test_set[5][0], memory.test_set[5][0])


def test_a_data_set_on_disk_is_known_by_its_files_and_crop(tmp_path: Path) -> None:
    replica("cub", tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    here, there = (describe_dataset(module("cub", tmp_path / place).root) for place in ("data", "moved"))
    assert here == there
    assert describe_dataset(module("cub", tmp_path / "data", crop_size=20).root) != here
    other = next((tmp_path / "moved").glob("**/*.jpg"))
    other.write_bytes(other.read_bytes() + b"x")
    assert describe_dataset(module("cub", tmp_path / "moved").root) != here


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_image_is_named_and_left_out_only_on_request(
    tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = replica("cub", tmp_path / "data")
    bad = root / "CUB_200_2011" / "images" / "007.kind006" / "picture_2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"picture_2\.jpg cannot be read as an image"):
        list(module("cub", root, in_memory=in_memory).test_dataloader())
    with caplog.at_level(logging.WARNING):
        data = module("cub", root, in_memory=in_memory, skip_damaged=True)
    assert "1 damaged images are left out" in caplog.text
    assert "picture_2.jpg" in caplog.text
    assert len(data.test_set) == 35
    assert sum(len(b.batch[1]) for b in data.test_dataloader()) == 35


@every_data_set
def test_an_empty_folder_is_told_what_to_get(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is n.*(get|from) |is missing.*comes? from|is missing: mini"):
        MODULES.get(name, OmniglotDataModule)(tmp_path).setup()


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("cub", "CUB_200_2011/classes.txt", "classes.txt is missing: CUB_200_2011.tgz seems to be half extracted"),
        ("cifar100", "cifar-100-python/test", "test is missing: cifar-100-python.tar.gz seems to be half extracted"),
        ("tiny_imagenet", "tiny-imagenet-200/wnids.txt", "wnids.txt is missing: tiny-imagenet-200.zip seems"),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/val/images/val_6.JPEG",
            "val_6.JPEG is missing, and 1 of 108 .* are.*half",
        ),
        ("online_products", "Stanford_Online_Products/Ebay_test.txt", "Ebay_test.txt is missing"),
        ("mini_imagenet", "val.csv", "val.csv is missing: miniImageNet is train.csv, val.csv and test.csv"),
        ("in_shop", "Eval/list_eval_partition.txt", "list_eval_partition.txt and img.zip from https"),
        ("cars_devkit", "devkit/cars_meta.mat", "cars_meta.mat is missing"),
    ],
)
def test_half_an_archive_is_no_archive(name: str, gone: str, words: str, tmp_path: Path) -> None:
    root = replica(name, tmp_path / "data")
    (root / gone).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        module(name, root)


@every_data_set
def test_a_part_of_a_data_set_is_not_taken_for_the_whole(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the whole of|MD5 checksum"):
        MODULES.get(name, OmniglotDataModule)(replica(name, tmp_path / "data")).setup()


def packed(name: str, folder: Path) -> Path:
    """The replica's archive, as it would be fetched, in a folder of its own."""
    inner, suffix = {
        "cub": ("CUB_200_2011", ".tgz"), "cifar100": ("cifar-100-python", ".tar.gz"),
        "tiny_imagenet": ("tiny-imagenet-200", ".zip"),
    }[name]  # fmt: skip
    kind = "zip" if suffix == ".zip" else "gztar"
    made = shutil.make_archive(str(folder / "made"), kind, replica(name, folder / "whole"), inner)
    (folder / "data").mkdir()
    return Path(shutil.move(made, folder / "data" / f"{inner}{suffix}"))


@pytest.mark.parametrize("name", ["cub", "cifar100", "tiny_imagenet"])
def test_an_archive_is_unpacked_whole_or_not_at_all(name: str, tmp_path: Path) -> None:
    archive = packed(name, tmp_path)
    content = archive.read_bytes()
    with pytest.raises(ValueError, match="MD5 checksum"):
        MODULES[name](archive.parent).prepare_data()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        module(name, archive.parent)
    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(content)
    assert torch.equal(module(name, archive.parent).root.labels, module(name, tmp_path / "whole").root.labels)


def test_an_archive_with_paths_outside_leaves_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "CUB_200_2011.tgz", "w:gz") as made:
        made.addfile(tarfile.TarInfo("../../escaped.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="cannot be unpacked"):
        module("cub", tmp_path / "data")
    assert not list(tmp_path.glob("**/escaped.txt"))
    assert not (tmp_path.parent / "escaped.txt").exists()


def test_what_is_downloaded_is_used_and_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed("cub", tmp_path)
    fetched = []

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        fetched.append((url, md5))
        shutil.copy(archive, root / filename)

    monkeypatch.setattr("lightning_rkd.data.datasets.archives.download_url", fetch)
    (tmp_path / "fresh").mkdir()
    assert len(module("cub", tmp_path / "fresh", download=True).root) == 72
    module("cub", tmp_path / "fresh", download=True)
    assert fetched == [(cub.ARCHIVE.url, cub.ARCHIVE.md5)]

    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("lightning_rkd.data.datasets.archives.download_url", offline)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"cannot be downloaded \(no route to host\): get CUB_200_2011\.tgz from https"):
        module("cub", tmp_path / "empty", download=True)


def test_a_product_in_both_lists_is_refused(tmp_path: Path) -> None:
    root = replica("online_products", tmp_path / "data")
    table = root / "Stanford_Online_Products" / "Ebay_test.txt"
    table.write_text(table.read_text() + "999 3 1 chair_final/1002_0.JPG\n")
    with pytest.raises(ValueError, match=r"the split shares classes: '3' is in train and in test"):
        module("online_products", root, validation=0)


def test_a_class_with_few_samples_repeats_them_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = module("online_products", tmp_path / "data")
    assert "have fewer than samples_per_class=3 samples, so batches repeat some" in caplog.text
    assert all(sorted(Counter(y.tolist()).values()) == [3, 3] for _, y in data.train_dataloader())


def test_query_marks_reach_the_metric(tmp_path: Path) -> None:
    data = module("in_shop", tmp_path / "data", eval_batch_size=7)
    batches = [b.batch for b in data.test_dataloader()]
    assert all(isinstance(b, QuerySample) for b in batches)
    queries = torch.cat([unpack(b).is_query for b in batches])  # type: ignore[misc]
    assert queries.tolist() == [n % 2 == 0 for _ in range(6) for n in range(6)]
    assert all(len(b.batch) == 2 for b in data.val_dataloader())
    torch.manual_seed(0)
    embeddings, labels = torch.randn(36, 4), torch.cat([b.labels for b in batches])
    metric = EmbeddingRetrieval()
    metric.update(embeddings, labels, is_query=queries)
    found = torch.cdist(embeddings[queries], embeddings[~queries]).argmin(1)
    assert metric.compute()["recall_at_1"] == (labels[~queries][found] == labels[queries]).float().mean()


@pytest.mark.slow
def test_a_trained_student_is_tested_by_query_and_gallery(tmp_path: Path) -> None:
    data = module("in_shop", tmp_path / "data", validation=0.34)
    net = ConvNet(widths=[4, 8], embedding_dim=8, in_channels=3)
    metrics = {"retrieval": EmbeddingRetrieval()}
    student = DistillationModule(net, task_loss=TripletMarginLoss(), metrics=metrics, optimizer=toys.sgd)
    trainer = toys.trainer(max_steps=2)
    trainer.fit(student, datamodule=data)
    result = trainer.test(student, datamodule=data, verbose=False)[0]
    net.eval()
    x = torch.stack([data.test_set[i].inputs for i in range(36)])
    with torch.no_grad():
        rows = net(x)
    queries = torch.arange(36) % 6 % 2 == 0
    labels = torch.arange(36) // 6
    found = torch.cdist(rows[queries].double(), rows[~queries].double()).argmin(1)
    expected = (labels[~queries][found] == labels[queries]).float().mean()
    assert abs(result["test/recall_at_1"] - float(expected)) < 0.06  # near ties


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    root = replica("cifar100", tmp_path / "data")
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps({"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="is not CIFAR's, or is damaged"):
        module("cifar100", root)
    assert not (tmp_path / "ran").exists()


def test_cifars_own_pickles_are_read(tmp_path: Path) -> None:
    """Python 2 and NumPy 1 wrote them: byte strings, and an array rebuilt by ``numpy.core.multiarray``."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    raw = array.tobytes()
    text = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n"
        + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06" + raw + b"tbu."
    )  # fmt: skip
    (tmp_path / "file").write_bytes(text)
    with (tmp_path / "file").open("rb") as file:
        assert np.array_equal(cifar._ArraysOnly(file, encoding="latin1").load()["data"], array)


def test_omniglot_turns_characters_into_classes(tmp_path: Path) -> None:
    root = replica("omniglot", tmp_path / "data", classes=4)
    data = OmniglotDataModule(root, check=False, image_size=21)
    data.setup()
    plain = OmniglotDataModule(root, check=False, rotations=False, image_size=21)
    plain.setup()
    assert len(data.root) == 4 * len(plain.root)
    assert len(data.class_names) == 4 * len(plain.class_names) == 4 * 44
    labels = data.root.labels.tolist()
    upright, once, thrice = (
        data.root.images[labels.index(data.class_names.index(f"Greek/character04/rot{angle}"))]
        for angle in ("000", "090", "270")
    )
    assert torch.equal(once, upright.rot90(1, (1, 2)))
    assert torch.equal(thrice, upright.rot90(3, (1, 2)))
    assert int(upright[0, 20, 20]) == 0 < int(upright.max())  # paper is black, ink is white
    test = {data.class_names[c] for c in data.root.labels[torch.tensor(data.test_set.indices)].tolist()}
    assert {name.split("/")[0] for name in test} == {"Gurmukhi", "Kannada", "Tibetan"}
    assert {name[:20] for name in test if name[0] == "G"} == {"Gurmukhi/character42"}
    val = {data.class_names[c].split("/")[0] for c in data.root.labels[torch.tensor(data.val_set.indices)].tolist()}
    assert val == {"Armenian", "Bengali", "Hebrew"}


def test_vinyals_split_has_the_published_sizes() -> None:
    """Characters per alphabet, from the publisher's table."""
    sizes = {
        "Armenian": 41, "Bengali": 46, "Early_Aramaic": 22, "Hebrew": 22, "Mkhedruli_(Georgian)": 41, "Gurmukhi": 45,
        "Kannada": 41, "Keble": 26, "Malayalam": 47, "Manipuri": 40, "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45, "Oriya": 46, "Sylheti": 28, "Syriac_(Serto)": 23, "Tengwar": 25,
        "Tibetan": 42, "ULOG": 26,
    }  # fmt: skip
    counts = Counter(omniglot._vinyals(f"{a}/character{c:02d}") for a, n in sizes.items() for c in range(1, n + 1))
    assert counts[1] == 172
    assert counts[2] == 423
    assert counts[0] == 41  # the other 987 that train are in alphabets that nothing names
    assert omniglot._vinyals("Greek/character01/rot090") == 0


@pytest.mark.parametrize("split", ["background", "alphabets"])
def test_omniglot_divides_whole_alphabets(split: str, tmp_path: Path) -> None:
    root = replica("omniglot", tmp_path / "data", classes=2, images=4)
    data = OmniglotDataModule(root, split=split, check=False)  # type: ignore[arg-type]
    data.setup()
    parts = [
        {data.class_names[int(data.root.labels[i])].split("/")[0] for i in part.indices}
        for part in (data.train_set, data.val_set, data.test_set)
    ]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 10
    if split == "background":
        assert parts[2] == {"Angelic", "Gurmukhi", "Kannada", "Tibetan"}


def test_omniglots_archives_are_unpacked_and_their_checksums_compared(tmp_path: Path) -> None:
    root = replica("omniglot", tmp_path / "whole", classes=2, images=4)
    (tmp_path / "zips").mkdir()
    for part in ("images_background", "images_evaluation"):
        shutil.make_archive(str(tmp_path / "zips" / part), "zip", root, part)
    with pytest.raises(ValueError, match=r"images_background\.zip has the MD5 checksum"):
        OmniglotDataModule(tmp_path / "zips").prepare_data()
    here, there = (OmniglotDataModule(folder, check=False) for folder in (root, tmp_path / "zips"))
    assert torch.equal(here.load().images, there.load().images)


@pytest.mark.skipif(not (REAL / "omniglot-small.zip").is_file(), reason="no ../shared/data beside this checkout")
def test_a_part_of_omniglot_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(REAL / "omniglot-small.zip") as archive:
        archive.extractall(tmp_path)
    data = OmniglotDataModule(tmp_path, split="alphabets")
    data.setup()
    assert data.root.images.shape == (4 * 4840, 1, 28, 28)
    assert len(data.class_names) == 4 * 242
    assert 0.02 < float(data.root.images.float().mean()) / 255 < 0.2  # ink
