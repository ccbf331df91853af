"""Export of a student: weights, a PyTorch program, an ONNX program, and a model card."""

import copy
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_rkd.export.card import Facts, measure_latency, model_card
from lightning_rkd.export.read import CONFIG, WEIGHTS, build_network, load_weights, read_config, sha256

FORMATS = {"safetensors": WEIGHTS, "torch": "student.pt2", "onnx": "student.onnx"}
"""File of each format."""

_CARD = "README.md"
_TOLERANCE = 1e-4  # largest difference of an exported program from the student, in units of its largest output
_BATCHES = (1, 2, 7)  # sizes of the random batches on which programs are compared with the student
Program = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """A student cannot be exported in a format."""


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
    example: Tensor,
    folder: str | Path,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    build: Mapping[str, Any] | None = None,
    input_scaling: Mapping[str, Sequence[float]] | None = None,
    facts: Facts | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a network for use without its teacher and without Lightning.

    - ``student.safetensors`` and ``config.json``: the weights and the description of the network, for :func:`load`.
    - ``student.pt2``: ``torch.export.load("student.pt2").module()``, without the network's code.
    - ``student.onnx``: for onnxruntime and others. Needs ``pip install 'lightning-rkd[export]'``.
    - ``README.md``: a model card.

    Both programs take batches of any size. They are compared with the network on random inputs before the folder is
    written. A copy of the network is exported, in eval mode.

    Args:
        network: The student, including its classifier if it has one.
        example: An input (N, ...) of the network; only its shape and dtype matter.
        folder: A new or empty folder, or that of an earlier export with ``overwrite``.
        formats: Some of ``"safetensors"``, ``"torch"``, ``"onnx"``.
        build: Class path and arguments, ``{"class_path": ..., "init_args": {...}}``, from which :func:`load` builds
            the network; without it :func:`load` needs a network.
        input_scaling: ``{"mean": [...], "std": [...]}`` per channel, with which inputs in 0 to 1 are normalised before
            the network; documented in the files, not part of the programs.
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
    _check_formats(formats)
    _check_folder(folder, overwrite)
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    example = example[:1].detach().cpu()
    rebuilt = copy.deepcopy(network) if build is None else _rebuild(build, network)
    outputs = _outputs(network, example)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
        place = Path(part, "export")
        place.mkdir()
        differences, failed = _write_formats(network, rebuilt, example, place, formats)
        facts = facts or Facts()
        config = {
            "made_by": "lightning-rkd export",
            "format": 1,
            "network": None if build is None else dict(build),
            "input": {"shape": ["N", *example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")}
            | ({"range": [0.0, 1.0], **input_scaling} if input_scaling else {}),
            "output": {"shape": ["N", *outputs.shape[1:]], "dtype": str(outputs.dtype).removeprefix("torch.")},
            "parameters": sum(p.numel() for p in network.parameters()),
            "versions": {"lightning-rkd": version("lightning-rkd"), "torch": str(torch.__version__)},
            "files": {path.name: sha256(path) for path in sorted(place.iterdir())},
        }
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        times = measure_latency(network, example, place / FORMATS["onnx"])
        sizes = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        card = model_card(config, facts, sizes, times, differences, _TOLERANCE, failed)
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


def _write_formats(
    network: nn.Module, rebuilt: nn.Module, example: Tensor, place: Path, formats: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Write and verify each format; returns differences and failures. ``rebuilt`` receives the written weights."""
    writers: dict[str, Callable[[nn.Module, Tensor, Path], Program]] = {
        "safetensors": partial(_write_safetensors, rebuilt),
        "torch": _write_torch,
        "onnx": _write_onnx,
    }
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in FORMATS:
        if name not in formats:
            continue
        path = place / FORMATS[name]
        try:
            with _quiet():
                program = writers[name](network, example, path)
                difference = _difference(network, program, example)
        except ExportError as error:
            failed[name] = str(error)
            path.unlink(missing_ok=True)
            continue
        if not difference <= _TOLERANCE:
            cure = f"leave the format {name!r} out"
            if name == "safetensors":
                cure = "build describes a network that computes something else"
            raise ExportError(
                f"{path.name} gives other numbers than the student: they differ by {difference:.1e} of its largest "
                f"output, and {_TOLERANCE:.0e} is allowed. Nothing was written; {cure}"
            )
        if name != "safetensors":
            differences[name] = difference
    if len(failed) == len(set(formats)):
        raise ExportError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return differences, failed


def _write_safetensors(rebuilt: nn.Module, network: nn.Module, example: Tensor, path: Path) -> Program:
    save_file({name: x.contiguous().clone() for name, x in network.state_dict().items()}, path)
    load_weights(rebuilt, load_file(path))
    return rebuilt


def _write_torch(network: nn.Module, example: Tensor, path: Path) -> Program:
    program = _program(network, example)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> Program:
    import onnxruntime

    program, names = _program(network, example), {"input_names": ["input"], "output_names": ["output"]}
    try:
        torch.onnx.export(program, (), path, **names, dynamo=True, external_data=False, verbose=False)  # type: ignore[arg-type]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # both have many errors for operations and dtypes that they do not know
        raise ExportError(f"ONNX has no form for this network that onnxruntime runs: {_first_line(error)}") from error
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _program(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph, for batches of any size."""
    two = example.expand(2, *example.shape[1:]).contiguous()  # a batch of one would become a constant
    try:
        return torch.export.export(network, (two,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # any error of the network's code while it is traced
        raise ExportError(
            f"torch.export cannot follow this network ({_first_line(error)}): its forward must not branch on the "
            "values of tensors"
        ) from error


def _difference(network: nn.Module, program: Program, example: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for size in _BATCHES:
        shape = (size, *example.shape[1:])
        floating = example.is_floating_point()
        x = torch.randn(shape, generator=generator) if floating else torch.randint(0, 2, shape, generator=generator)
        x = x.to(example.dtype)
        with torch.no_grad():
            expected = network(x)
            try:
                found = program(x)
            except Exception as error:  # a guard of the trace, a missing kernel, a dtype that NumPy does not know
                raise ExportError(f"its program does not run on a batch of {size}: {_first_line(error)}") from error
        if not expected.isfinite().all():
            raise ValueError("the student itself gives NaN or infinity on random inputs; nothing was written")
        if expected.shape != found.shape or not found.isfinite().all():
            return float("inf")
        expected, found = expected.double(), found.double()
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12)))
    return worst


def _outputs(network: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = network(example)
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or len(outputs) != 1:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the network must turn a batch (N, ...) into one tensor (N, ...); a batch of one gave {found}"
        )
    return outputs


def _check_formats(formats: Sequence[str]) -> None:
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
    others = sorted({path.name for path in folder.iterdir()} - {CONFIG, _CARD, *FORMATS.values()})
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
