import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_rkd.data import ImageFolderDataModule
from lightning_rkd.data.datamodules.folder import decode, find_images, suggest_size

REAL = Path(__file__).parents[4] / "shared" / "data"


def picture(path: Path, value: Any = 100, size: tuple[int, int] = (20, 20), mode: str = "L", **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **save)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of four grey images, two levels down."""
    for c in range(10):
        for i in range(4):
            picture(tmp_path / "data" / f"part{c % 2}" / f"class{c}" / f"{i}.png", 20 * c + i)
    return tmp_path / "data"


def module(root: Path, **settings: Any) -> ImageFolderDataModule:
    made = ImageFolderDataModule(root, **settings)
    made.setup()
    return made


def test_a_class_is_the_folder_that_directly_holds_the_images(folder: Path) -> None:
    data = module(folder)
    assert sorted(data.class_names) == sorted(f"part{c % 2}/class{c}" for c in range(10))
    for image, label in zip(data.root.images, data.root.labels, strict=True):
        assert int(image.max()) // 20 == int(data.class_names[int(label)][-1])
    parts = [{y for _, y in part} for part in (data.train_set, data.val_set, data.test_set)]
    assert [len(p) for p in parts] == [6, 2, 2]
    assert set.union(*parts) == set(range(10))


def test_other_and_hidden_files_are_passed_over(folder: Path) -> None:
    picture(folder / ".thumbs" / "a.png")
    picture(folder / "__MACOSX" / "a.png")
    picture(folder / "part0" / "class0" / "._0.png")
    (folder / "part0" / "class0" / "notes.txt").write_text("no image")
    found = find_images(folder)
    assert list(find_images(folder.parent)) == list(found), "folders above all classes are left out of the names"
    assert len(found) == 10
    assert len(found["part0/class0"]) == 4


def test_sizes_come_from_the_data(folder: Path) -> None:
    data = module(folder)
    assert data.image_shape == (1, 20, 20)
    assert (data.classes_per_batch, data.samples_per_class) == (6, 4)
    assert next(iter(data.train_dataloader()))[0].shape == (24, 1, 20, 20)
    assert module(folder, image_size=16, classes_per_batch=2, samples_per_class=3).image_shape == (1, 16, 16)


def test_large_images_are_brought_to_64(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", size=(300, 80)) for i in range(3)]
    assert suggest_size(paths) == 64
    assert decode(paths, 64).shape == (3, 1, 64, 64)


def test_one_colour_image_makes_all_of_them_colour(tmp_path: Path) -> None:
    grey = [
        picture(tmp_path / "a.png", 50), picture(tmp_path / "b.png", (50, 50, 50), mode="RGB"),
        picture(tmp_path / "c.png", 1, mode="1"),
    ]  # fmt: skip
    assert decode(grey, 20).shape == (3, 1, 20, 20)
    assert decode(grey, 20)[:, 0, 0, 0].tolist() == [50, 50, 255]
    both = decode([*grey, picture(tmp_path / "d.png", (10, 20, 30), mode="RGB")], 20)
    assert both[:, :, 5, 5].tolist() == [[50] * 3, [50] * 3, [255] * 3, [10, 20, 30]]


def test_transparent_deep_and_palette_images_are_read_as_they_look(tmp_path: Path) -> None:
    clear = picture(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")
    Image.fromarray(np.full((20, 20), 300 * 128, dtype=np.uint16)).save(tmp_path / "b.png")
    Image.new("RGB", (20, 20), (10, 200, 30)).convert("P").save(tmp_path / "c.png")
    pixels = decode([clear, tmp_path / "b.png", tmp_path / "c.png"], 20)[:, :, 0, 0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert pixels[1].tolist() == [150, 150, 150]
    assert np.abs(pixels[2].astype(int) - [10, 200, 30]).max() < 30


def test_a_camera_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(np.array([[250, 0]], dtype=np.uint8), 20, axis=0).repeat(10, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = decode([tmp_path / "a.png"], 20)[0, 0]
    assert upright[0].tolist() == [250] * 20
    assert upright[-1].tolist() == [0] * 20


def fill(folder: Path, counts: Sequence[int], value: Any = 100, **kwargs: Any) -> Path:
    """A class per count, with so many equal images."""
    for c, count in enumerate(counts):
        for i in range(count):
            picture(folder / f"{c}" / f"{i}.png", value, **kwargs)
    return folder


def test_only_colour_images_are_mirrored(folder: Path, tmp_path: Path) -> None:
    assert not module(folder).train_set.augment.flip
    assert module(fill(tmp_path / "colour", [2] * 6, (40, 10, 20), mode="RGB")).train_set.augment.flip


def test_a_cap_keeps_that_many_images_of_each_class(folder: Path) -> None:
    capped = module(folder, max_images_per_class=3)
    assert torch.bincount(capped.root.labels).tolist() == [3] * 10
    assert torch.equal(capped.root.images, module(folder, max_images_per_class=3).root.images)


def test_classes_with_one_image_only_train(folder: Path) -> None:
    for i in range(7):
        picture(folder / f"single{i}" / "0.png")
    data = module(folder)
    assert len(data.class_names) == 17
    singles = [i for i, name in enumerate(data.class_names) if name.startswith("single")]
    assert len(singles) == 7
    assert max(singles) < data.num_train_classes


def test_given_splits_are_followed(folder: Path) -> None:
    data = module(folder, splits={"test": ["part1/*"], "validation": ["part0/class0", "part0/class2"]})
    assert data.class_names[:3] == ["part0/class4", "part0/class6", "part0/class8"]
    assert data.class_names[3:5] == ["part0/class0", "part0/class2"]
    assert data.class_names[5:] == [f"part1/class{c}" for c in (1, 3, 5, 7, 9)]


def test_validation_is_drawn_from_the_training_part_where_it_is_not_given(folder: Path) -> None:
    data = module(folder, splits={"test": ["part1/*"], "train": ["part0/class[0246]"]})
    assert data.num_train_classes == 2
    assert {*data.class_names[:4]} == {f"part0/class{c}" for c in (0, 2, 4, 6)}
    assert len(data.class_names) == 9
    # what no key names is in no part
    assert len(data.train_set) + len(data.val_set) + len(data.test_set) == 36


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"tset": ["*"]}, r"got \['tset'\]"),
        ({"train": ["*"]}, "under the key test"),
        ({"test": ["nothing*"]}, "no class matches 'nothing\\*' under 'test'"),
        ({"test": ["part1/*"], "validation": ["*/class1"]}, "'part1/class1' is in validation and in test"),
        ({"test": ["part1/class1"]}, "1 classes for test"),
    ],
)
def test_impossible_splits_are_refused(folder: Path, splits: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, splits=splits)


def test_missing_or_empty_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        module(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="it is a file"):
        module(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images under .*empty"):
        module(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        module(folder, test_root=tmp_path / "nowhere")


def test_too_few_classes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 7 classes, 5 of them with two images or more, and at least 6"):
        module(fill(tmp_path, [2, 2, 2, 2, 2, 1, 1]))


@pytest.mark.parametrize("content", [b"no image at all", b"", None], ids=["text", "empty", "cut"])
def test_an_unreadable_image_is_named(folder: Path, content: bytes | None) -> None:
    path = folder / "part0" / "class4" / "2.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:700]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part0.class4.2\.png cannot be read as an image .*skip_damaged=True"):
        module(folder)


def test_damaged_images_are_left_out_and_listed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = module(folder)
    (folder / "part0" / "class4" / "2.png").write_bytes(b"no image at all")
    found = module(folder, skip_damaged=True)
    assert len(found.root) == len(whole.root) - 1
    assert found.class_names == whole.class_names
    assert "1 damaged images are left out" in caplog.text
    assert "2.png" in caplog.text


def test_a_class_seen_in_two_parts_of_a_data_set_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        fill(tmp_path / part, [2] * 6)
    with pytest.raises(ValueError, match=r"'test/0' and 'train/0' .* look like one class"):
        module(tmp_path)
    assert len(module(tmp_path / "train").class_names) == 6


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "omniglot-small.zip").exists(), reason="needs ../shared/data/omniglot-small.zip")
def test_handwriting_is_read_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(REAL / "omniglot-small.zip") as archive:
        archive.extractall(tmp_path)
    data = module(tmp_path)
    assert data.image_shape == (1, 64, 64)
    assert len(data.root) == 4840
    assert len(data.class_names) == 242
    assert data.root.images.float().mean() > 200
    held = module(tmp_path, splits={"test": ["Balinese/*"]})
    assert {name.split("/")[0] for name in held.class_names[: held.num_train_classes]}.isdisjoint({"Balinese"})


# A folder of its own for the test


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """Eight classes of six images to train and three to test; an image's brightness says its class and its part."""
    for c in range(8):
        for i in range(9):
            folder = tmp_path / ("train" if i < 6 else "test") / f"class{c}"
            picture(folder / f"{i}.png", 20 * c + 10 * (i >= 6) + i % 6)
    return tmp_path / "train", tmp_path / "test"


def content(data: ImageFolderDataModule, part: str) -> set[tuple[str, bool]]:
    """Class and whether the image is of the folder for the test, of all images of a part."""
    rows = list(getattr(data, f"{part}_set").indices)
    values = data.root.images[rows].flatten(1).amax(1).tolist()
    found = {(f"class{value // 20}", value % 20 >= 10) for value in values}
    assert {name for name, _ in found} == {data.class_names[y] for y in data.root.labels[rows].tolist()}
    return found


def test_by_classes_the_test_classes_consist_of_the_second_folder(parts) -> None:
    data = module(parts[0], test_root=parts[1], splits={"test": ["class[67]"], "validation": ["class[45]"]})
    assert content(data, "train") == {(f"class{c}", False) for c in range(4)}
    assert content(data, "val") == {("class4", False), ("class5", False)}
    assert content(data, "test") == {("class6", True), ("class7", True)}
    assert [len(data.train_set), len(data.val_set), len(data.test_set)] == [24, 12, 6]


def test_divided_by_samples_the_second_folder_is_the_test(parts) -> None:
    data = module(parts[0], test_root=parts[1], split_by="samples", validation=1 / 3)
    every = [f"class{c}" for c in range(8)]
    assert content(data, "train") == content(data, "val") == {(name, False) for name in every}
    assert content(data, "test") == {(name, True) for name in every}
    assert [len(data.train_set), len(data.val_set), len(data.test_set)] == [32, 16, 24]


def test_a_test_class_needs_no_images_to_train(parts) -> None:
    for path in (parts[0] / "class7").iterdir():
        path.unlink()
    data = module(parts[0], test_root=parts[1], splits={"test": ["class[67]"]})
    assert content(data, "test") == {("class6", True), ("class7", True)}
    with pytest.raises(ValueError, match=r"test_root .* holds the class 'class7', which root .* lacks"):
        module(parts[0], test_root=parts[1], split_by="samples")
