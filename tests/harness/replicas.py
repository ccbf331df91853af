"""Tiny data sets in the layouts of the official archives; they need ``check=False``, for they are not whole."""

import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ALPHABETS = {
    "images_background": ("Armenian", "Bengali", "Greek", "Hebrew", "Latin", "Tagalog"),
    "images_evaluation": ("Angelic", "Gurmukhi", "Kannada", "Tibetan"),
}


def replica(name: str, folder: Path, classes: int = 12, images: int = 6) -> Path:
    """Write the data set of :data:`REPLICAS` into ``folder`` and return what a data module's ``root`` should be.

    Every image of class c is of one colour, whose red is ``shade(c)``. ``images``, at least 4, is per class; data sets
    with test images of their own have half as many of them besides. Of Omniglot, ``classes`` is per alphabet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    REPLICAS[name](folder, classes, images)
    return folder


def photos(root: Path, images: int, size: int) -> Path:
    """Eight classes of colour images, in two folders of folders."""
    rng = np.random.default_rng(0)
    for c in range(8):
        folder = root / f"group{c % 2}" / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(images):
            pixels = np.clip(rng.normal(30 * c, 20, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def shade(c: int) -> int:
    return 10 * (c % 25) + 5


def number_of(name: str) -> int:
    """The c of a class, by its name."""
    return int(re.findall(r"\d+", name)[-1])


def _picture(path: Path, c: int, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade(c), 128, 64)).save(path)


def cifar(folder: Path, classes: int, images: int, hundred: bool = False) -> None:
    base = folder / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    base.mkdir()
    names = [f"kind{c:02d}" for c in range(classes)]
    files = [("train", images)] if hundred else [(f"data_batch_{i}", images) for i in range(1, 6)]
    for file, count in [*files, ("test" if hundred else "test_batch", images // 2)]:
        labels = [c for c in range(classes) for _ in range(count)]
        colours = np.array([[shade(c), 128, 64] for c in labels], np.uint8)
        content = {"data": colours.repeat(1024, axis=1), "fine_labels" if hundred else "labels": labels}
        (base / file).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"fine_label_names": names} if hundred else {"label_names": names}
    (base / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))


def cub(folder: Path, classes: int, images: int) -> None:
    base, lists = folder / "CUB_200_2011", dict.fromkeys(("images", "image_class_labels", "train_test_split"), "")
    for i, (c, n) in enumerate((c, n) for c in range(classes) for n in range(images)):
        file = f"{c + 1:03d}.kind{c:03d}/picture_{n}.jpg"
        _picture(base / "images" / file, c)
        lists["images"] += f"{i + 1} {file}\n"
        lists["image_class_labels"] += f"{i + 1} {c + 1}\n"
        lists["train_test_split"] += f"{i + 1} {int(n % 3 > 0)}\n"
    lists["classes"] = "".join(f"{c + 1} {c + 1:03d}.kind{c:03d}\n" for c in range(classes))
    for name, text in lists.items():
        (base / f"{name}.txt").write_text(text)


def _annotations(rows: list[dict[str, object]]) -> np.ndarray:
    made = np.zeros((1, len(rows)), [(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        made[0, i] = tuple(row.values())
    return made


def _names(classes: int) -> np.ndarray:
    return np.array([[f"Make kind {c:03d}" for c in range(classes)]], object)


def cars(folder: Path, classes: int, images: int) -> None:
    rows: list[dict[str, object]] = []
    for i, (c, n) in enumerate((c, n) for c in range(classes) for n in range(images)):
        file = f"car_ims/{i + 1:06d}.jpg"
        _picture(folder / file, c)
        rows.append({"relative_im_path": file, "bbox_x1": 1, "class": c + 1, "test": int(n % 2)})
    savemat(folder / "cars_annos.mat", {"annotations": _annotations(rows), "class_names": _names(classes)})


def cars_devkit(folder: Path, classes: int, images: int) -> None:
    for part, table in {"cars_train": "cars_train_annos", "cars_test": "cars_test_annos_withlabels"}.items():
        rows: list[dict[str, object]] = []
        for i, c in enumerate(c for c in range(classes) for _ in range(images // 2)):
            _picture(folder / part / f"{i + 1:05d}.jpg", c)
            rows.append({"bbox_x1": 1, "class": c + 1, "fname": f"{i + 1:05d}.jpg"})
        (folder / "devkit").mkdir(exist_ok=True)
        savemat(folder / "devkit" / f"{table}.mat", {"annotations": _annotations(rows)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": _names(classes)})


def online_products(folder: Path, classes: int, images: int) -> None:
    base = folder / "Stanford_Online_Products"
    i = 0
    for part, things in {"train": range(classes // 2), "test": range(classes // 2, classes)}.items():
        text = "image_id class_id super_class_id path\n"
        for c in things:
            for n in range(2 + c % (images - 1)):
                file, i = f"chair_final/{1000 + c}_{n}.JPG", i + 1
                _picture(base / file, c)
                text += f"{i} {c + 1} 1 {file}\n"
        (base / f"Ebay_{part}.txt").write_text(text)


def in_shop(folder: Path, classes: int, images: int) -> None:
    rows = []
    for c in range(classes):
        for n in range(images):
            file = f"img/WOMEN/Dresses/id_{c:08d}/02_{n}_front.jpg"
            _picture(folder / "Img" / file, c)
            rows.append(f"{file} id_{c:08d} {'train' if c < classes // 2 else ('query', 'gallery')[n % 2]}\n")
    (folder / "Eval").mkdir()
    (folder / "Eval" / "list_eval_partition.txt").write_text(
        f"{len(rows)}\nimage_name item_id evaluation_status\n" + "".join(rows)
    )


def tiny_imagenet(folder: Path, classes: int, images: int) -> None:
    base, marked = folder / "tiny-imagenet-200", ""
    for c in range(classes):
        for n in range(images):
            _picture(base / "train" / f"n{c:08d}" / "images" / f"n{c:08d}_{n}.JPEG", c, (64, 64))
        for n in range(images // 2):
            file = f"val_{c * images + n}.JPEG"
            _picture(base / "val" / "images" / file, c, (64, 64))
            marked += f"{file}\tn{c:08d}\t0\t32\t44\t62\n"
    (base / "val" / "val_annotations.txt").write_text(marked)
    (base / "wnids.txt").write_text("".join(f"n{c:08d}\n" for c in reversed(range(classes))))


def omniglot(folder: Path, classes: int, images: int) -> None:
    for part, alphabets in ALPHABETS.items():
        for alphabet in alphabets:
            first = 35 if alphabet == "Gurmukhi" else 1  # characters 42 to 45 of it test
            for c in range(first, first + max(classes, 8 if first > 1 else 0)):
                for n in range(images):
                    page = Image.new("1", (105, 105), 1)
                    page.paste(0, (10, 10, 10 + c, 30 + n))
                    path = folder / part / alphabet / f"character{c:02d}" / f"{c:04d}_{n + 1:02d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    page.save(path)


def mini_imagenet(folder: Path, classes: int, images: int) -> None:
    third = classes // 3
    parts = {"train": range(third, classes - third), "val": range(third), "test": range(classes - third, classes)}
    for part, members in parts.items():
        text = "filename,label\n"
        for c in members:
            for n in range(images):
                _picture(folder / "images" / f"n{c:08d}{n:08d}.jpg", c, (84, 84))
                text += f"n{c:08d}{n:08d}.jpg,n{c:08d}\n"
        (folder / f"{part}.csv").write_text(text)


REPLICAS: dict[str, Callable[[Path, int, int], None]] = {
    **{made.__name__: made for made in (cars, cars_devkit, cub, in_shop, mini_imagenet, omniglot, online_products)},
    **{"cifar10": cifar, "cifar100": partial(cifar, hundred=True), "tiny_imagenet": tiny_imagenet},
}
