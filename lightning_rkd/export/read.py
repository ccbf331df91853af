"""Loading of exported students, with PyTorch and safetensors alone, and what their preprocessing needs."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_rkd.export.preprocess import TOKENIZER, Preprocess, load_preprocess
from lightning_rkd.export.use import check_items
from lightning_rkd.utils.private import tree_map
from lightning_rkd.utils.types import call_network

CONFIG, WEIGHTS, PROGRAM = "config.json", "student.safetensors", "student.pt2"
_PRETRAINED = (
    "lightning_rkd.models.torchvision_embedder",
    "lightning_rkd.models.backbones.torchvision_embedder",
    "torchvision.models.",
)
_RESCALING = ("googlenet", "inception_v3")


class Embedder(nn.Module):
    """A network with its preprocessing: a list of images, texts or vectors -> embeddings (N, D), without gradients.

    It stays in eval mode; its ``network`` can be trained on the inputs that ``preprocess`` gives.

    Args:
        network: The network, from the inputs that ``preprocess`` gives.
        preprocess: Function from a list of items, or a tensor, to the network's inputs.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.preprocess, self.training = network, preprocess, False

    def train(self, mode: bool = True) -> Self:
        """Leave the mode as it is."""
        return self

    @torch.no_grad()
    def forward(self, items: Any, batch_size: int = 64) -> Tensor:
        """Embeddings (N, D) of a list, computed in batches."""
        check_items(items)
        device = next((x.device for x in (*self.network.parameters(), *self.network.buffers())), torch.device("cpu"))
        rows = []
        for start in range(0, len(items), batch_size):
            inputs = self.preprocess(items[start : start + batch_size])
            rows.append(call_network(self.network, tree_map(lambda x: x.to(device), inputs)))
        return torch.cat(rows)


def load(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Load an exported student in eval mode on the CPU.

    The class named in ``config.json`` is imported, and called if it is a network. Load only folders that you trust, as
    with any code.

    Args:
        folder: Folder written by :func:`~lightning_rkd.export.export`, or output of ``lightning-rkd distill``, which
            has one, ``student``.
        network: Network of the student's architecture that receives the weights, where ``config.json`` names no class.

    Returns:
        The network. If it was exported with its preprocessing, an :class:`Embedder`: ``student(["a text"])``,
        ``student([image])`` or ``student(images)``, with images of Pillow or a tensor of pixels from 0 to 1. Where
        there is no class to build it from, or ``read`` took a part of the output, its network is the program
        ``student.pt2``; without that program the network whose output is to be read is returned.

    Raises:
        FileNotFoundError: The folder holds no exported student.
        ValueError: The weights are damaged or do not fit the network, or there is no class to build it from.

    Example:
        >>> import tempfile
        >>> from lightning_rkd.export import ImagePreprocess, export
        >>> from lightning_rkd.models import ConvNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net = ConvNet(widths=(4,), embedding_dim=8).eval()
        ...     build = {"class_path": "lightning_rkd.models.ConvNet", "init_args": {"widths": [4], "embedding_dim": 8}}
        ...     out, gray = Path(folder, "student"), ImagePreprocess((8, 8), mean=(0.5,), std=(0.5,))
        ...     _ = export(net, torch.zeros(1, 1, 8, 8), out, formats=["safetensors"], build=build, preprocess=gray)
        ...     x = torch.rand(2, 1, 8, 8)
        ...     torch.equal(load(out)(x), net((x - 0.5) / 0.5))
        True
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "student" / CONFIG).is_file():  # the output of distill
        folder = folder / "student"
    config = read_config(folder)
    preprocess = None
    if config.get("preprocess"):
        if TOKENIZER in config["files"]:
            _check_file(folder, TOKENIZER, config)
        preprocess = load_preprocess(config["preprocess"], folder)
    read = config.get("read") is not None  # part of the program, not of the network
    if (
        network is None
        and (read or config["network"] is None)
        and preprocess is not None
        and PROGRAM in config["files"]
    ):
        return Embedder(torch.export.load(_check_file(folder, PROGRAM, config)).module(), preprocess)
    path = _check_file(folder, WEIGHTS, config)
    if network is None:
        if config["network"] is None:
            raise ValueError(
                f"{CONFIG} names no class for this student, which was exported without build: pass network=..., a "
                f"network of its architecture, or take {PROGRAM} or student.onnx, which need none"
            )
        network = build_network(config["network"])
    try:
        load_weights(network, load_file(path))
    except RuntimeError as error:
        raise ValueError(f"the weights in {str(path)!r} do not fit {type(network).__name__}: {error}") from error
    return network.eval() if preprocess is None or read else Embedder(network.eval(), preprocess)


def _check_file(folder: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Path of a file of an export, with the SHA-256 of its configuration."""
    path = folder / name
    if not path.is_file():
        form = "safetensors" if name == WEIGHTS else "torch"
        raise FileNotFoundError(f"{str(folder)!r} holds no {name}: it was exported without the format {form!r}")
    if sha256(path) != config["files"][name]:
        raise ValueError(f"{str(path)!r} is damaged, or of another student: its SHA-256 is not that of {CONFIG}")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of an export."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no exported student: there is no {CONFIG} in it")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ours = config["made_by"] == "lightning-rkd export" and {"files", "network"} <= config.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{str(path)!r} is not the {CONFIG} of an exported student")
    return config


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a network, which adopts their precision."""
    for name, own in (*network.named_parameters(), *network.named_buffers()):
        if name in tensors:
            own.data = own.data.to(tensors[name].dtype)
    network.load_state_dict(tensors)


def build_network(description: dict[str, Any]) -> nn.Module:
    """Build a network from a class path and its arguments, which may be such descriptions themselves.

    ``weights`` of torchvision's models are dropped, so that nothing is downloaded.
    """
    network: nn.Module = _build(description, nn.Module)
    return network


def _find_result(make: Callable[..., Any]) -> type | None:
    """Class of what a class or an annotated function returns."""
    try:
        found = make if inspect.isclass(make) else get_type_hints(make).get("return")
    except (NameError, TypeError):
        found = None
    return found if inspect.isclass(found) else None


def _build(value: Any, kind: type = object) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        path = value["class_path"]
        module, _, name = path.rpartition(".")
        try:
            make: Callable[..., Any] = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"there is no class {path!r} to build the student from: {error}") from error
        result = _find_result(make)
        if result is None or not issubclass(result, kind):
            raise ValueError(
                f"{path} is not called: expected a class, or a function with a class as return annotation, of "
                f"{'networks' if kind is nn.Module else 'arguments'}"
            )
        if value.get("dict_kwargs"):
            raise ValueError(f"{path} has dict_kwargs, which are not passed on: give init_args")
        arguments = {k: _build(v) for k, v in (value.get("init_args") or {}).items()}
        if isinstance(arguments.get("weights"), str) and path.startswith(_PRETRAINED):
            model = arguments.get("name", name)
            if model in _RESCALING:
                raise ValueError(
                    f"{model} rescales its inputs when it is built with pretrained weights, and does not without them: "
                    "pass the network itself to lightning_rkd.export.export, without build, and take student.pt2 or "
                    "student.onnx"
                )
            del arguments["weights"]
        try:
            return make(**arguments)
        except TypeError as error:
            raise ValueError(f"{path} could not be built: {error}") from error
    if isinstance(value, list):
        return [_build(part) for part in value]
    return value
