"""Data to distil on, from folders, tables, arrays and objects, and their division."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lightning_rkd.cli.distill.parts import split_rows
from lightning_rkd.cli.distill.samples import Samples, read_array, read_samples
from tests.cli.distill.toys import write_texts
from tests.harness import replicas


def test_a_folder_of_folders_gives_images_and_classes(tmp_path: Path) -> None:
    found = read_samples(replicas.photos(tmp_path, images=3, size=8))
    assert (found.kind, len(found), len(found.class_names)) == ("image", 24, 8)
    (image,) = found.fetch([0])
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert found.name(0) == "row 0, group0/class0/0.png"
    assert read_samples(tmp_path, unlabelled=True).labels is None


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (4, 4), 100 * i).save(tmp_path / f"{i}.png")
    found = read_samples(tmp_path)
    assert (len(found), found.labels) == (3, None)
    assert found.fetch([1])[0].mode == "RGB"


@pytest.mark.parametrize("form", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_gives_texts_and_labels(form: str, tmp_path: Path) -> None:
    rows = [{"question": "What, now?", "topic": "b"}, {"question": 'a "quoted" text', "topic": "a"}]
    path = tmp_path / f"table{form}"
    if form == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    elif form == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cut = "," if form == ".csv" else "\t"
        lines = [cut.join(f'"{cell}"' for cell in cells) for cells in (["question", "topic"], ["What, now?", "b"])]
        path.write_text("\n".join([*lines, f'"a ""quoted"" text"{cut}a']), encoding="utf-8-sig")  # as spreadsheets do
    found = read_samples(path, text_column="question", label_column="topic")
    assert found.fetch([0, 1]) == ["What, now?", 'a "quoted" text']
    assert found.labels is not None
    assert (found.labels.tolist(), found.class_names) == ([1, 0], ["a", "b"])


@pytest.mark.parametrize("form", [".npy", ".safetensors"])
def test_an_array_gives_vectors(form: str, tmp_path: Path) -> None:
    x, path = torch.randn(5, 3), tmp_path / f"rows{form}"
    np.save(path, x.numpy()) if form == ".npy" else save_file({"rows": x}, path)
    (tmp_path / "labels.txt").write_text("b\na\nb\na\na\n")
    found = read_samples(path, tmp_path / "labels.txt")
    assert found.labels is not None
    assert torch.equal(found.fetch([4, 0]), x[[4, 0]])
    assert found.labels.tolist() == [1, 0, 1, 0, 0]


def test_objects_are_samples() -> None:
    assert read_samples(["a", "b"]).kind == "text"
    assert read_samples([Image.new("RGB", (4, 4))]).kind == "image"
    images = read_samples(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), labels=torch.tensor([3, 1]))
    assert images.fetch([1])[0].size == (4, 4)
    assert images.class_names == ["1", "3"]
    assert read_samples(np.zeros((2, 3), np.float32)).kind == "vector"


def test_the_fingerprint_tells_other_data_and_labels_apart(tmp_path: Path) -> None:
    one, same, other = (read_samples(["a", text], labels=[0, 1]) for text in ("b", "b", "c"))
    assert one.fingerprint == same.fingerprint
    labelled = read_samples(["a", "b"], labels=[1, 0])
    assert len({one.fingerprint, other.fingerprint, labelled.fingerprint, read_samples(["a", "b"]).fingerprint}) == 4


@pytest.mark.parametrize("test", [True, False])
def test_many_classes_are_divided_and_few_are_not(test: bool) -> None:
    labels = torch.arange(10).repeat_interleave(5)
    many = split_rows(Samples("vector", torch.zeros(50, 2), labels, list("abcdefghij")), test)
    parts = [set(labels[rows].tolist()) for rows in many[:3]]
    assert [len(part) for part in parts] == ([6, 2, 2] if test else [8, 2, 0])
    assert sum(map(len, many[:3])) == 50
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    few = split_rows(Samples("vector", torch.zeros(50, 2), labels % 3, list("abc")), test)
    assert [len(rows) for rows in few[:3]] == ([35, 5, 10] if test else [45, 5, 0])
    assert sorted([*few.train, *few.validation, *few.test]) == list(range(50))


def test_another_seed_holds_out_other_classes() -> None:
    labels = torch.arange(20).repeat_interleave(2)
    data = Samples("vector", torch.zeros(40, 2), labels, [str(c) for c in range(20)])
    assert split_rows(data, True, 0) == split_rows(data, True, 0)
    assert split_rows(data, True, 0).test != split_rows(data, True, 1).test


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no data .*absent.*: expected a folder of images, a table of texts"),
        ("empty", "no images under .*empty"),
        ("a.pdf", "has the suffix '.pdf': expected a folder of images"),
        ("texts.csv", "has no column 'question': name one of text, topic with --text-column"),
        ("blank.csv", "row 1 has no text in the column 'question'"),
        ("rowless.csv", "has no rows"),
        ("unlabelled.csv", "row 1 has no label in the column 'topic'"),
        ("latin.csv", "is not in UTF-8"),
        ("broken.jsonl", r"line 2 of .*broken\.jsonl' is no JSON"),
        ("list.jsonl", r"line 1 of .*: expected an object, such as {\"text\": ...}, got \[1\]"),
        ("nan.npy", "row 1 holds NaN or infinity"),
        ("whole.npy", "takes floating point"),
    ],
)
def test_bad_data_are_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("")
    write_texts(tmp_path / "texts.csv", 3)
    (tmp_path / "blank.csv").write_text("question,topic\nwhat,a\n ,b\n")
    (tmp_path / "rowless.csv").write_text("question\n")
    (tmp_path / "unlabelled.csv").write_text("question,topic\nwhat,a\nwhy,\n")
    (tmp_path / "latin.csv").write_bytes("question,topic\nänd,a\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"question": "what", "topic": "a"}\n{"question": \n')
    (tmp_path / "list.jsonl").write_text("[1]")
    np.save(tmp_path / "nan.npy", np.array([[0.0], [np.nan]]))
    np.save(tmp_path / "whole.npy", np.array([[0], [1]]))
    with pytest.raises((OSError, ValueError), match=message):
        read_samples(tmp_path / name, text_column="question", label_column="topic")


@pytest.mark.parametrize(
    ("data", "got"),
    [(3, "got 3"), ([], r"got \[\]"), ([1, "a"], "got list of int and str"), ({"a": 1}, "got {'a': 1}")],
)
def test_objects_that_are_no_samples_are_refused(data: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"data: expected a path, an array .* PIL images, {got}"):
        read_samples(data)


def test_labels_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 labels for 3 samples"):
        read_samples(["a", "b", "c"], labels=[0, 1])


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one\.png cannot be read"):
        read_samples(tmp_path).fetch([0])


def test_rows_in_an_order_of_their_own_are_refused() -> None:
    x = torch.randn(3, 2)
    save_file({"rows": x, "ids": torch.tensor([0, 1, 2])}, "rows.safetensors")
    assert torch.equal(read_array("rows.safetensors"), x)
    save_file({"rows": x, "ids": torch.tensor([0, 2, 1])}, "rows.safetensors")
    with pytest.raises(ValueError, match=r"'rows.safetensors' has ids other than 0 to 2: order the rows"):
        read_array("rows.safetensors")
    np.save("whole.npy", np.zeros((3, 2), np.int64))
    with pytest.raises(ValueError, match=r"'whole.npy': distill takes floating point"):
        read_array("whole.npy")


def test_labels_of_two_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="labels: expected texts or numbers, and one kind of them"):
        read_samples(["one", "two"], [1, "1"])
