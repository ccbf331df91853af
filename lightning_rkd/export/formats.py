"""Formats of an exported network, each compared with the network on random inputs."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_rkd.export.read import PROGRAM, WEIGHTS, load_weights
from lightning_rkd.utils.types import call_network

FORMATS = {"safetensors": WEIGHTS, "torch": PROGRAM, "onnx": "student.onnx"}
"""File of each format."""

TOLERANCE = 1e-4  # largest difference of an exported program from the student, in units of its largest output
_BATCHES = (1, 2, 7)  # sizes of the random batches on which programs are compared with the student
Inputs = dict[Any, Tensor]  # by keyword, and positional ones by 0, 1, ...
Program = Callable[[Inputs], Tensor]


class ExportError(RuntimeError):
    """A student cannot be exported in a format."""


def write_formats(
    network: nn.Module, rebuilt: nn.Module, example: Inputs, place: Path, formats: Sequence[str]
) -> tuple[dict[str, float], dict[str, str], bool]:
    """Write and verify each format; returns differences, failures, and whether the number of tokens is free.

    ``rebuilt`` receives the written weights.
    """
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    traced, free = cache(partial(_trace, network, example)), True
    writers: dict[str, Callable[[Path], Program]] = {
        "safetensors": partial(_write_safetensors, network, rebuilt),
        "torch": lambda path: _write_torch(traced(), path),
        "onnx": lambda path: _write_onnx(traced(), list(name_inputs(example)), path),
    }
    for name in FORMATS:
        if name not in formats:
            continue
        path = place / FORMATS[name]
        try:
            with _quiet():
                program = writers[name](path)
                shorter = name != "safetensors" and _is_length_free(traced())
                difference = _difference(network, program, example, shorter)
        except ExportError as error:
            failed[name] = str(error)
            path.unlink(missing_ok=True)
            continue
        if not difference <= TOLERANCE:
            cure = f"leave the format {name!r} out"
            if name == "safetensors":
                cure = "take out what the network draws at random in eval mode, or correct build"
            raise ExportError(
                f"{path.name} gives other numbers than the student: they differ by {difference:.1e} of its largest "
                f"output, and {TOLERANCE:.0e} is allowed. Nothing was written; {cure}"
            )
        if name != "safetensors":
            differences[name], free = difference, shorter
    if len(failed) == len(set(formats)):
        raise ExportError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return differences, failed, free


def _write_safetensors(network: nn.Module, rebuilt: nn.Module, path: Path) -> Program:
    # save_file makes a file that only its owner can read
    path.write_bytes(save({name: x.contiguous().clone() for name, x in network.state_dict().items()}))
    load_weights(rebuilt, load_file(path))
    return partial(call_network, rebuilt)


def _write_torch(program: torch.export.ExportedProgram, path: Path) -> Program:
    torch.export.save(program, path)
    return partial(call_network, torch.export.load(path).module())


def _write_onnx(program: torch.export.ExportedProgram, names: list[str], path: Path) -> Program:
    import onnxruntime

    named: dict[str, Any] = {"input_names": names, "output_names": ["output"]}
    try:
        torch.onnx.export(program, (), path, **named, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # both have many errors for operations and dtypes that they do not know
        raise ExportError(f"ONNX has no form for this network that onnxruntime runs: {_first_line(error)}") from error
    return lambda x: torch.from_numpy(session.run(None, {name: one.numpy() for name, one in name_inputs(x).items()})[0])


def _trace(network: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    """The network as a graph, for batches of any size and, where it allows, any number of tokens."""
    sizes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    rows = 3 if any(x.shape[1] == 2 for x in example.values() if is_tokens(x)) else 2  # equal sizes would be tied
    inputs = {key: x.repeat(rows, *[1] * (x.ndim - 1)) for key, x in example.items()}  # one row would be a constant
    for x in inputs.values():
        sizes[x] = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.AUTO} if is_tokens(x) else {})
    words = {key: x for key, x in inputs.items() if isinstance(key, str)}
    positional = tuple(inputs[number] for number in range(len(inputs) - len(words)))
    forward = partial(network.forward)
    # the guards of a program know no inputs that its network takes as **kwargs
    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in name_inputs(inputs)]
    forward.__signature__ = Signature(named)  # type: ignore[attr-defined]
    try:
        network.forward = forward
        return torch.export.export(network, positional, words, dynamic_shapes=sizes)
    except Exception as error:  # any error of the network's code while it is traced
        raise ExportError(
            f"torch.export cannot follow this network ({_first_line(error)}): its forward must not branch on the "
            "values of tensors"
        ) from error


def _is_length_free(program: torch.export.ExportedProgram) -> bool:
    """True if no input of tokens has a fixed number of them."""
    names = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    return not any(str(x.shape[1]).isdecimal() for x in inputs if is_tokens(x))  # a fixed one may be a SymInt


def _difference(network: nn.Module, program: Program, example: Inputs, shorter: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for number, size in enumerate(_BATCHES):
        x = {key: _draw(one, size, shorter and number % 2 == 1, generator) for key, one in example.items()}
        with torch.no_grad():
            expected = call_network(network, x)
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


def _draw(example: Tensor, rows: int, shorter: bool, generator: torch.Generator) -> Tensor:
    """Random values of an input, with half as many tokens where asked."""
    shape = [rows, *example.shape[1:]]
    if example.is_floating_point():
        return torch.randn(shape, generator=generator).to(example.dtype)
    if shorter and is_tokens(example):
        shape[1] = -(-shape[1] // 2)
    largest = int(example.max())
    x = torch.randint(largest + 1, shape, generator=generator)
    x[..., :1] = largest  # a mask leaves a token in every row
    return x.to(example.dtype)


def is_tokens(x: Tensor) -> bool:
    """True for integers (N, T)."""
    return x.ndim == 2 and not x.is_floating_point() and not x.is_complex()


def name_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by their names in the files."""
    one = len(inputs) == 1
    return {name if isinstance(name, str) else "input" if one else f"input_{name}": x for name, x in inputs.items()}


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
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
