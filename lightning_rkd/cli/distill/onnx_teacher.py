"""Teachers in ONNX, run by onnxruntime; what they take is read from the signature of their inputs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_rkd.cli.distill.samples import Kind
from lightning_rkd.utils.imports import require

_MEAN, _STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], dtype=np.float32)  # of ImageNet


class OnnxTeacher:
    """A program in ONNX from samples to embeddings.

    Images are resized to the height and width of its input (224 where these are free) and normalised with the mean and
    standard deviation of ImageNet. Texts are passed as strings where its input is of strings, and else as tokens of the
    ``tokenizer.json`` beside the file; outputs (N, T, D) are averaged over the tokens. Vectors are passed as they are.
    The first output is read.

    Args:
        path: The file.
        kind: Kind of the samples.
    """

    def __init__(self, path: str | Path, kind: Kind) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"the teacher {str(path)!r} does not exist: expected a file in ONNX")
        onnxruntime = require("onnxruntime", extra="export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an error for each kind of damage
            raise ValueError(f"{str(path)!r} is no ONNX file that onnxruntime runs: {error}") from error
        content = path.read_bytes()
        self.key, self.kind, self.how = hashlib.sha256(content).hexdigest()[:16], kind, ""
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        first = next(iter(self.inputs.values()))
        if kind == "image":
            if len(first.shape) != 4 or "float" not in first.type:
                raise ValueError(f"{str(path)!r} takes {first.type} {first.shape}, not images (N, C, H, W)")
            self.size = [n if isinstance(n, int) else 224 for n in first.shape[2:]]
            self.how = "images of {} x {} pixels, normalised as ImageNet's".format(*self.size)
        elif kind == "text" and first.type != "tensor(string)":
            self.tokenizer = _read_tokenizer(path.with_name("tokenizer.json"))

    def __call__(self, items: Any) -> Tensor:
        """Embeddings of samples, (N, D)."""
        first = next(iter(self.inputs))
        mask: npt.NDArray[Any] | None = None
        feed: dict[str, npt.NDArray[Any]]
        if self.kind == "vector":
            feed = {first: items.numpy()}
        elif self.kind == "image":
            feed = {first: np.stack([self._normalise(image) for image in items])}
        elif self.inputs[first].type == "tensor(string)":
            feed = {first: np.array(list(items), dtype=object)}
        else:
            feed, mask = self._tokenize(items)
        (found, *_) = self.session.run(None, feed)
        x = torch.from_numpy(np.asarray(found, dtype=np.float32))
        if x.ndim == 3:
            weights = torch.ones(x.shape[:2]) if mask is None else torch.from_numpy(mask).float()
            x = (x * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return x.flatten(1)

    def _normalise(self, image: Any) -> npt.NDArray[np.float32]:
        height, width = self.size
        pixels = np.asarray(image.resize((width, height), 3), dtype=np.float32) / 255
        scaled: npt.NDArray[np.float32] = (pixels - _MEAN) / _STD
        return scaled.transpose(2, 0, 1)

    def _tokenize(self, items: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]:
        encoded = self.tokenizer.encode_batch(list(items))
        given = {
            "input_ids": np.array([one.ids for one in encoded], dtype=np.int64),
            "attention_mask": np.array([one.attention_mask for one in encoded], dtype=np.int64),
            "token_type_ids": np.array([one.type_ids for one in encoded], dtype=np.int64),
        }
        names = list(self.inputs)
        feed = {name: given.get(name, given["input_ids"] if name == names[0] else None) for name in names}
        if unknown := [name for name, value in feed.items() if value is None]:
            raise ValueError(f"the ONNX teacher takes {unknown[0]!r}; inputs of tokens are {', '.join(given)}")
        return {name: value for name, value in feed.items() if value is not None}, given["attention_mask"]


def _read_tokenizer(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"an ONNX teacher of tokens needs its tokenizer: there is no {str(path)!r}")
    tokenizer = require("tokenizers", extra="transformers").Tokenizer.from_file(str(path))
    tokenizer.enable_padding()
    return tokenizer
