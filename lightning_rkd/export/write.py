"""Export of a student: weights, a PyTorch program, an ONNX program, and a model card."""

import copy
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.export import use
from lightning_rkd.export.card import Facts, measure_latency, model_card
from lightning_rkd.export.formats import FORMATS, TOLERANCE, Inputs, is_tokens, name_inputs, write_formats
from lightning_rkd.export.preprocess import TOKENIZER, ImagePreprocess, Preprocess
from lightning_rkd.export.read import CONFIG, build_network, read_config, sha256
from lightning_rkd.utils.arguments import bind_arguments, find_signature
from lightning_rkd.utils.types import Key, call_network, select

_CARD, _USE = "README.md", "use.py"


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: The folder.
        files: Sizes in bytes by name.
        differences: Largest difference of each program from the student on random inputs, in units of its largest
            output.
        failed: Reasons of missing formats.
    """

    folder: Path
    files: Mapping[str, int]
    differences: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)


def export(
    network: nn.Module,
    example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    folder: str | Path,
    *,
    read: Callable[[Any, Mapping[Any, Any]], Tensor] | Key | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    build: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    facts: Facts | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a network for use without its teacher and without Lightning.

    - ``student.safetensors`` and ``config.json``: the weights and the description of the network, for :func:`load`.
    - ``student.pt2``: ``torch.export.load("student.pt2").module()``, without the network's code.
    - ``student.onnx``: for onnxruntime and others. Needs ``pip install 'lightning-rkd[export]'``.
    - ``use.py``, with ``preprocess`` and the ONNX program: ``embed(items)``, which needs numpy and onnxruntime alone,
      and Pillow for images.
    - ``README.md``: a model card.

    Both programs take batches of any size, and tokens (N, T) of any length. They are compared with the network on
    random inputs before the folder is written. A copy of the network is exported, in eval mode.

    Args:
        network: The student, including its classifier if it has one.
        example: An input (N, ...) of the network, a tuple of inputs, or a mapping, whose entries are passed as
            keywords. Only shape and dtype matter, and the largest of integers: random ones are drawn from 0 to it.
            Integers (N, T) are tokens, of any number unless the network fixes it; the files say which.
        folder: A new or empty folder, or that of an earlier export with ``overwrite``.
        read: How to read a tensor from the output: the name of its field, or a function ``read(output, arguments)``
            such as :func:`~lightning_rkd.mean_pool`. It is part of the programs, not of the weights.
        formats: Some of ``"safetensors"``, ``"torch"``, ``"onnx"``.
        build: Class path and arguments, ``{"class_path": ..., "init_args": {...}}``, from which :func:`load` builds
            the network; without it :func:`load` needs a network.
        preprocess: Function from images, texts or vectors to the network's inputs, such as
            :class:`~lightning_rkd.export.ImagePreprocess`; :func:`load` and ``use.py`` then take such items.
        facts: Facts for the model card.
        overwrite: Replace an earlier export.

    Returns:
        The files and differences. A format that this network does not support is named in ``failed``, as long as
        another one succeeded.

    Raises:
        FileExistsError: The folder holds other files, or an earlier export.
        ImportError: The packages of ONNX are not installed.
        ValueError: An unknown format, a description that does not build this network, or a network that gives NaN on
            random inputs.
        ExportError: No format succeeded, or a program gives other numbers.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(nn.Linear(3, 2), torch.zeros(1, 3), Path(folder, "student"), formats=["torch"])
        ...     sorted(done.files), done.differences["torch"] < 1e-6
        (['README.md', 'config.json', 'student.pt2'], True)
    """
    folder = Path(folder).resolve()
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise TypeError(f"preprocess: expected a Preprocess of lightning_rkd.export, got {type(preprocess).__name__}")
    check_formats(formats)
    _check_folder(folder, overwrite)
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    rebuilt = copy.deepcopy(network) if build is None else _rebuild(build, network)
    inputs = _take_row(example)
    if read is not None:
        for one in (network, rebuilt):
            one.register_forward_hook(partial(_read, read, find_signature(one)), with_kwargs=True)
    outputs = _outputs(network, inputs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
        place = Path(part, "export")
        place.mkdir()
        differences, failed, free = write_formats(network, rebuilt, inputs, place, formats)
        if preprocess is not None:
            preprocess.save(place)
            if FORMATS["onnx"] in {path.name for path in place.iterdir()}:
                shutil.copyfile(use.__file__, place / _USE)
        facts = facts or Facts()
        scaling: dict[str, Any] = {}
        if isinstance(preprocess, ImagePreprocess):
            scaling = {"range": [0.0, 1.0], "mean": preprocess.mean, "std": preprocess.std}
        config = {
            "made_by": "lightning-rkd export",
            "format": 1,
            "network": None if build is None else dict(build),
            "inputs": {name: _describe(x, free) | scaling for name, x in name_inputs(inputs).items()},
            "read": read if read is None or isinstance(read, int | str) else getattr(read, "__name__", repr(read)),
            "output": {"shape": ["N", *outputs.shape[1:]], "dtype": str(outputs.dtype).removeprefix("torch.")},
            "parameters": sum(p.numel() for p in network.parameters()),
            "versions": {"lightning-rkd": version("lightning-rkd"), "torch": str(torch.__version__)},
            "preprocess": None if preprocess is None else preprocess.config(),
            "files": {path.name: sha256(path) for path in sorted(place.iterdir())},
        }
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        times = measure_latency(network, inputs, place / FORMATS["onnx"])
        sizes = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        described = "" if preprocess is None else preprocess.describe()
        card = model_card(config, facts, sizes, times, differences, TOLERANCE, failed, described)
        (place / _CARD).write_text(card, encoding="utf-8")
        _move(place, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(folder, sizes, differences, failed)


def _move(place: Path, folder: Path) -> None:
    """Put an export in the place of an earlier one, which is restored if that fails."""
    before = place.with_name("before")  # removed with the temporary folder
    if folder.exists():
        folder.rename(before)
    try:
        place.rename(folder)
    except BaseException:
        if before.exists():
            before.rename(folder)
        raise


def _take_row(example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]) -> Inputs:
    """The first row of each input, by name or position."""
    several = example if isinstance(example, tuple | Mapping) else (example,)
    entries = several if isinstance(several, Mapping) else dict(enumerate(several))
    for x in entries.values():
        if not isinstance(x, Tensor):
            raise TypeError(f"example: expected a tensor, or a tuple or mapping of tensors, got {type(x).__name__}")
    return {name: x[:1].detach().cpu() for name, x in entries.items()}


def _describe(x: Tensor, free: bool) -> dict[str, Any]:
    shape = ["N", *x.shape[1:]]
    if free and is_tokens(x):
        shape[1] = "T"
    return {"shape": shape, "dtype": str(x.dtype).removeprefix("torch.")}


def _read(read: Any, signature: Any, network: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Hook that puts what ``read`` finds in the place of the output."""
    return read(output, bind_arguments(signature, args, kwargs)) if callable(read) else select(output, read)


def _outputs(network: nn.Module, example: Inputs) -> Tensor:
    with torch.no_grad():
        outputs = call_network(network, example)
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or len(outputs) != 1:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the network must turn a batch (N, ...) into one tensor (N, ...); a batch of one gave {found}. Say which "
            "part of another output is meant, read='pooler_output', or how to pool it, read=mean_pool"
        )
    return outputs


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that are unknown, or whose packages are not installed."""
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(formats) or 'none'}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ImportError(
            f"the format onnx needs {', '.join(missing)}: pip install 'lightning-rkd[export]', or leave it out"
        )


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{str(folder)!r} is a file; choose a folder")
    if folder == Path.cwd():
        raise FileExistsError(f"{str(folder)!r} is the folder you are in, and would be replaced; name another")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        read_config(folder)
    except (FileNotFoundError, ValueError):
        raise FileExistsError(f"{str(folder)!r} holds files that no export made; choose another folder") from None
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} holds an earlier export; choose another folder, or overwrite it")
    others = sorted({path.name for path in folder.iterdir()} - {CONFIG, _CARD, _USE, TOKENIZER, *FORMATS.values()})
    if others:
        raise FileExistsError(
            f"{str(folder)!r} also holds {', '.join(others)}, which no export made: move it away first"
        )


def _rebuild(build: Mapping[str, Any], network: nn.Module) -> nn.Module:
    rebuilt = build_network(dict(build)).eval()
    made, own = ({name: x.shape for name, x in net.state_dict().items()} for net in (rebuilt, network))
    for name in (*own, *made):
        if made.get(name) != own.get(name):
            raise ValueError(f"build describes another network than the one that is exported: they differ in {name!r}")
    return rebuilt
