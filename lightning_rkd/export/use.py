"""Embeddings of an exported student, with numpy and onnxruntime alone, and Pillow for images.

>>> from use import embed  # doctest: +SKIP
>>> embed(["photo.jpg", "another.jpg"]).shape  # doctest: +SKIP
(2, 128)

This file belongs to the folder in which it lies. ``python use.py ITEM ...`` prints a line of numbers for each image or
text.
"""

import json
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]


def embed(items: Any, folder: str | Path | None = None, batch_size: int = 64) -> npt.NDArray[np.float32]:
    """Embeddings of a list of images (paths, Pillow's images, arrays of bytes (H, W, 3)), of texts, or of vectors.

    Args:
        items: The list, or an array (N, ...).
        folder: Folder of the export; ``None`` is that of this file.
        batch_size: Number of items that are held at once.
    """
    check_items(items)
    session, prepare = _open(str(folder or Path(__file__).parent))
    names = [given.name for given in session.get_inputs()]
    rows = []
    for start in range(0, len(items), batch_size):
        arrays = prepare(items[start : start + batch_size])
        inputs = {name: arrays[name] for name in names} if isinstance(arrays, dict) else {names[0]: arrays}
        rows.append(session.run(None, inputs)[0])
    return np.concatenate(rows)


def check_items(items: Any) -> None:
    """Raise for a single item in place of a list, and for an empty one."""
    if not hasattr(items, "__len__"):
        raise TypeError(f"expected a list, got a single item ({type(items).__name__}): pass [item]")
    if len(items) == 0:
        raise ValueError("there is nothing to embed: the list of items is empty")


@cache
def _open(folder: str) -> tuple[Any, Callable[[Any], Arrays]]:
    import onnxruntime

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if config.get("preprocess") is None:
        raise ValueError(f"the student in {folder!r} was exported without preprocessing: call student.onnx itself")
    session = onnxruntime.InferenceSession(str(Path(folder, "student.onnx")), providers=["CPUExecutionProvider"])
    return session, make_preprocess(config["preprocess"], folder)


def make_preprocess(config: dict[str, Any], folder: str | Path) -> Callable[[Any], Arrays]:
    """Function from a list of items to the network's inputs, from its part of ``config.json``."""
    kind = config["kind"]
    if kind == "image":
        return lambda items: normalize(read_pixels(items, config), config["mean"], config["std"])
    if kind == "pieces":
        vocabulary = config["vocabulary"]
        rows = None if vocabulary is None else {piece: row for row, piece in enumerate(vocabulary, start=1)}
        return partial(hash_texts, rows=config["rows"], longest=config["longest"], vocabulary=rows)
    if kind == "tokens":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        return partial(tokenize, tokenizer=tokenizer, longest=config["longest"], padding=config["padding"])
    return partial(to_rows, width=config["width"])


def read_pixels(items: Sequence[Any], config: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Images as bytes (N, C, H, W): stretched to the size, or scaled to cover it, with the centre cut out."""
    from PIL import Image, ImageOps

    if isinstance(items, str | Path | Image.Image):
        raise TypeError("expected a list of images, got a single one: pass [image]")
    height, width = config["size"]
    mode, resample = ("L", "RGB")[len(config["mean"]) == 3], Image.Resampling[config["interpolation"].upper()]
    pixels = np.empty((len(items), len(config["mean"]), height, width), np.uint8)
    for number, item in enumerate(items):
        image = Image.open(item) if isinstance(item, str | Path) else item
        with suppress(TypeError):  # an array of another type or shape
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if not isinstance(image, Image.Image) or image.mode[0] in "IF":
            found = f"an image of mode {image.mode}" if isinstance(image, Image.Image) else type(item).__name__
            found = f"an array of {item.dtype} {item.shape}" if isinstance(item, np.ndarray) else found
            raise TypeError(
                f"item {number}: expected an image of Pillow in 8 bits, its path, or an array of bytes (H, W, 3), got "
                f"{found}"
            )
        image = ImageOps.exif_transpose(image).convert(mode)
        ratios = image.width / width, image.height / height
        ratios = (min(ratios),) * 2 if config["fit"] == "cover" else ratios
        kept = (config["crop"] * ratio * size for ratio, size in zip(ratios, (width, height), strict=True))
        x, y = (max(0, long - short) / 2 for long, short in zip(image.size, kept, strict=True))
        image = image.resize((width, height), resample, (x, y, image.width - x, image.height - y))
        pixels[number] = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    return pixels


def normalize(pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """Bytes scaled to 0 to 1, minus the mean, divided by the standard deviation of each channel."""
    shift, scale = (np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (mean, std))
    normalized: npt.NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - shift) / scale
    return normalized


def split_text(text: str) -> list[str]:
    """Words of a text in lower case, each followed by its pieces of four characters.

    >>> split_text("My card")
    ['my', '<my>', 'card', '<car', 'card', 'ard>']
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())
    return [piece for word in words for piece in (word, *(f"<{word}>"[i : i + 4] for i in range(len(word) - 1)))]


def hash_texts(
    items: Sequence[str], rows: int, longest: int, vocabulary: dict[str, int] | None = None
) -> npt.NDArray[np.int64]:
    """Rows of a table for the words and pieces of each text, (N, T), ended by zeros: by CRC-32, or by vocabulary.

    >>> hash_texts(["My card", "a"], rows=2048, longest=512)
    array([[1001,   56,  959,  143,  959, 1162],
           [ 223,    0,    0,    0,    0,    0]])
    """
    found = []
    for text in _check_texts(items):
        pieces = split_text(text)
        if vocabulary is None:
            found.append([1 + zlib.crc32(piece.encode()) % (rows - 1) for piece in pieces[:longest]])
        else:
            found.append([vocabulary[piece] for piece in pieces if piece in vocabulary][:longest])
    return _pad(found, 0)


def tokenize(items: Sequence[str], tokenizer: Any, longest: int, padding: int) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens and attention mask of texts, (N, T) each."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    found = [one.ids for one in tokenizer.encode_batch(_check_texts(items))]
    return {"input_ids": _pad(found, padding), "attention_mask": _pad([[1] * len(ids) for ids in found], 0)}


def to_rows(items: Any, width: int) -> npt.NDArray[np.float32]:
    """Vectors (N, width) in float32."""
    rows = np.asarray(items, np.float32)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"expected vectors (N, {width}), got the shape {rows.shape}")
    return rows


def _check_texts(items: Sequence[str]) -> list[str]:
    if isinstance(items, str):
        raise TypeError("expected a list of texts, got a single one: pass [text]")
    for number, text in enumerate(items):
        if not isinstance(text, str):
            raise TypeError(f"item {number}: expected a text, got {type(text).__name__}")
    return list(items)


def _pad(rows: list[list[int]], value: int) -> npt.NDArray[np.int64]:
    padded = np.full((len(rows), max([1, *map(len, rows)])), value, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


if __name__ == "__main__":
    np.savetxt(sys.stdout, embed(sys.argv[1:]), fmt="%.6g")
