"""Teachers of ``lightning-rkd distill``, each with its own preprocessing."""

import inspect
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from lightning_rkd.cli.distill.onnx_teacher import OnnxTeacher
from lightning_rkd.cli.distill.pretrained import (
    Pool,
    load_sentence_transformer,
    load_timm,
    load_torchvision,
    load_transformers,
)
from lightning_rkd.cli.distill.samples import Kind, read_array
from lightning_rkd.cli.experiments.runs import digest
from lightning_rkd.data.fingerprint import describe_functions
from lightning_rkd.models.heads import count_parameters
from lightning_rkd.utils.imports import MissingExtraError
from lightning_rkd.utils.private import tree_map
from lightning_rkd.utils.types import call_network

FORMS = {
    "torchvision:NAME[@WEIGHTS]": "DEFAULT, another name of weights, a file, or none for random ones",
    "timm:NAME[@WEIGHTS]": "a file, or none",
    "hf:PATH_OR_NAME": "a model of transformers",
    "sentence-transformers:PATH": "",
    "onnx:FILE": "",
    "embeddings:FILE": ".npy or .safetensors, a row for each sample; or the output folder of an earlier distillation",
    "python:MODULE:FUNCTION": "from a list of samples to (N, D); or without arguments, to such a function or a network",
}
"""Forms of a teacher."""


@dataclass
class TeacherSource:
    """A teacher of samples.

    Attributes:
        name: The teacher as named by the user.
        key: Checksum of what it computes.
        embed: Function from a list of samples (PIL images, strings, or rows (M, D)) to embeddings (M, D').
        rows: Embeddings that are there already.
        made_for: Checksums of the data and test data that they were made for, where that is known.
        parameters: Number of parameters; 0 if unknown.
        how: What was chosen about its inputs and its output, in words.
    """

    name: str
    key: str = ""
    embed: Callable[[Any], Tensor] | None = None
    rows: Tensor | None = None
    made_for: Sequence[str] = ()
    parameters: int = 0
    how: str = ""

    def describe(self) -> str:
        """The teacher in words."""
        count = f"{self.parameters:,} parameters" if self.parameters else ""
        return ", ".join(filter(None, (self.name, count, self.how)))

    def embed_few(self, items: Any) -> Tensor:
        """Embeddings of some samples, or the first ones of those that are there."""
        if self.rows is not None:
            return self.rows[: len(items)]
        assert self.embed is not None
        return self.embed(items)


@dataclass
class NetworkTeacher:
    """A network with the function that turns samples into its inputs.

    Attributes:
        network: The network.
        prepare: Function from a list of samples to the network's inputs, a tensor or a mapping.
        read: Function from the network's output and its inputs to embeddings.
        device: Where it runs.
        bf16: Run in bf16 autocast with channels last.
    """

    network: nn.Module
    prepare: Callable[[Any], Any]
    read: Callable[[Any, Any], Tensor] = lambda output, inputs: output
    device: str = "cpu"
    bf16: bool = False

    def __call__(self, items: Any) -> Tensor:
        """Embeddings of samples, (N, D), float32 on the CPU."""
        self.network.to(self.device).eval()
        inputs = tree_map(self._move, self.prepare(items))
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            found: Tensor = self.read(call_network(self.network, inputs), inputs)
        return found.flatten(1).float().cpu()

    def _move(self, x: Any) -> Any:
        last = self.bf16 and isinstance(x, Tensor) and x.ndim == 4
        x = x.to(self.device) if isinstance(x, Tensor) else x
        return x.contiguous(memory_format=torch.channels_last) if last else x


def open_teacher(spec: Any, kind: Kind, pooling: str | None = None, device: str = "cpu") -> TeacherSource:
    """Open a teacher by its specification, one of :data:`FORMS`, or from an object.

    An object is a function from a list of samples to embeddings (N, D), a network whose attribute ``transform`` turns
    one sample into its input (rows need none), or an array with a row for each sample.

    Args:
        spec: The teacher.
        kind: Kind of the samples.
        pooling: How token outputs of transformers are pooled: ``"mean"``, ``"cls"``, ``"last"`` or ``"pooler"``.
        device: Where a network runs.

    Raises:
        ValueError: The specification has none of the forms, or its model cannot be loaded.
        FileNotFoundError: Its file does not exist.
        MissingExtraError: The package that it needs is not installed.
    """
    form, _, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if pooling is not None and form != "hf":
        raise ValueError(f"pooling={pooling!r} is for teachers hf:..., which give tokens; leave it out")
    if not isinstance(spec, str):
        return _from_object(spec, kind, type(spec).__name__, device)
    if form not in {key.partition(":")[0] for key in FORMS} or not rest:
        raise ValueError(f"the teacher {spec!r} has none of the forms " + ", ".join(FORMS))
    if form == "embeddings":
        rows, made_for = _read_run(Path(rest)) if Path(rest).is_dir() else (read_array(rest), ())
        return TeacherSource(spec, digest(rows), rows=rows, made_for=made_for)
    if form == "python":
        return _from_object(_import(rest), kind, spec, device)
    if form == "onnx":
        onnx = OnnxTeacher(rest, kind)
        return TeacherSource(spec, onnx.key, onnx, how=onnx.how)
    loaders: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
        "torchvision": partial(load_torchvision, rest, kind),
        "timm": partial(load_timm, rest, kind),
        "hf": partial(load_transformers, rest, kind, pooling),
        "sentence-transformers": partial(load_sentence_transformer, rest, kind),
    }
    try:
        network, prepare, read = loaders[form]()
    except (MissingExtraError, TypeError):
        raise
    except Exception as error:  # each package has errors of its own for what is not there
        if type(error) is FileNotFoundError:  # a file of weights; errors of the hub are subclasses of it
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the teacher {spec!r} is not here, and could not be fetched or loaded ({first}): check the name, or give "
            "a local file or folder"
        ) from error
    how = f"pooling {read.pooling}" if isinstance(read, Pool) else ""
    return _from_network(spec, NetworkTeacher(network, prepare, read, device), how)


def _read_run(folder: Path) -> tuple[Tensor, Sequence[str]]:
    """Embeddings in the output folder of a distillation, of its data and then of its test data; checksums of both."""
    rows, made_for = [], []
    for part in ("teacher", "teacher_test"):
        for path in sorted((folder / part).glob("rows-*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as shard:
                rows.append(shard.get_tensor("/embedding"))
                about = json.loads(shard.metadata()["rkd"])
            if about["shard"] == 0:
                made_for.append(about["data"])
    if not rows:
        raise FileNotFoundError(f"{str(folder)!r} holds no embeddings of a teacher: it is no output of a distillation")
    return torch.cat(rows), made_for


def _from_network(name: str, teacher: NetworkTeacher, how: str = "") -> TeacherSource:
    key = digest(*(x for x in teacher.network.state_dict().values() if isinstance(x, Tensor)))
    return TeacherSource(name, key, teacher, parameters=count_parameters(teacher.network), how=how)


def _from_object(given: Any, kind: Kind, name: str, device: str) -> TeacherSource:
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        rows = given.detach().float().cpu()
        return TeacherSource(name, digest(rows), rows=rows)
    if isinstance(given, nn.Module):
        transform = getattr(given, "transform", None)
        if transform is None and kind != "vector":
            raise TypeError(
                f"the teacher {name} has no transform: give the network an attribute transform, a function from one "
                f"{kind} to its input tensor, or pass a function from a list of samples to embeddings"
            )
        return _from_network(name, NetworkTeacher(given, partial(stack_transformed, transform), device=device))
    if not callable(given):
        raise TypeError(f"the teacher {name} is neither a function, a network nor an array, got {given!r:.80}")
    if _takes_nothing(given):
        return _from_object(given(), kind, name, device)
    return TeacherSource(name, describe_functions([given]), partial(_call, given, name))


def stack_transformed(transform: Callable[[Any], Tensor] | None, items: Any) -> Tensor:
    """Inputs of samples, each transformed; rows need no transform."""
    return items if transform is None else torch.stack([transform(item) for item in items])


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """True for a function that builds a teacher, rather than being one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _call(function: Callable[[Any], Any], name: str, items: Any) -> Tensor:
    with torch.no_grad():
        found = torch.as_tensor(function(items))
    if found.ndim != 2 or len(found) != len(items):
        raise ValueError(
            f"the teacher {name} returned shape {tuple(found.shape)} for {len(items)} samples: expected one row each"
        )
    return found.detach().float().cpu()


def _import(path: str) -> Any:
    module, _, name = path.rpartition(":")
    try:
        return pkgutil.resolve_name(f"{module}:{name}" if module else name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"python:{path} cannot be imported ({error}): expected python:MODULE:FUNCTION, of an installed package or "
            f"of a file in {Path.cwd()}"
        ) from error
