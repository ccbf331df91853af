"""The model card of an exported student: origin, scores, files and latency."""

import datetime
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_rkd.utils.provenance import hardware
from lightning_rkd.utils.types import call_network

SECONDS = 0.5
"""Time for which calls are measured, where fifty take longer."""


@dataclass(frozen=True)
class Facts:
    """Facts about a student that the network itself does not hold; ``scores_of`` are data and time of the scores."""

    name: str = "student"
    data: str = ""
    teacher: str = ""
    loss: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    scores_of: str = ""


def model_card(
    config: Mapping[str, Any],
    facts: Facts,
    sizes: Mapping[str, int],
    times: Sequence[tuple[str, int, float]],
    differences: Mapping[str, float],
    tolerance: float,
    failed: Mapping[str, str],
    preprocess: str = "",
) -> str:
    """Write the card in Markdown, for :func:`~lightning_rkd.export.export`."""
    inputs = config["inputs"]
    out = f"({', '.join(map(str, config['output']['shape']))})"
    how = _HOW | {"student.onnx": _HOW["student.onnx"].replace("INPUTS", ", ".join(f'"{n}": {n}' for n in inputs))}
    lines = [
        f"# {facts.name}",
        "A student network, exported alone: it needs neither its teacher nor PyTorch Lightning.",
        *([f"- items: {preprocess}, by `load` and `use.py`"] if preprocess else []),
        *(f"- {name}: {_describe_input(one)}" for name, one in inputs.items()),
        f"- output: {out}, {config['output']['dtype']}" + (f", read by `{config['read']}`" if config["read"] else ""),
        f"- parameters: {config['parameters']:,}",
    ]
    for heading, text in (("data", facts.data), ("teacher", facts.teacher), ("loss", facts.loss)):
        if "\n" in text.strip():
            lines.append(f"## {heading.capitalize()}\n\n```yaml\n{text.strip()}\n```")
        else:
            lines.append(f"- {heading}: {text or 'not given'}")
    if facts.scores:
        lines.append(
            f"## Scores\n\n{facts.scores_of}\n\n"
            + _table(["score", "value"], [[n, f"{v:.4f}"] for n, v in facts.scores.items()])
        )
    else:
        lines.append("- scores: not measured in this run")
    lines.append(
        "## Files\n\n"
        + _table(["file", "bytes", "how to load it"], [[f"`{n}`", f"{s:,}", how.get(n, "")] for n, s in sizes.items()])
    )
    if differences:
        compared = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        lines.append(
            f"On random inputs the exported programs differ from the student by at most: {compared} (in units of its "
            f"largest output; {tolerance:.0e} is allowed)."
        )
    lines += [f"Not exported: {name}, because {why}" for name, why in failed.items()]
    rows = [[program, str(batch), f"{milliseconds:.2f}"] for program, batch, milliseconds in times]
    threads = torch.get_num_threads()
    lines.append(
        f"## Latency\n\nMedian milliseconds of a call, {hardware('cpu')}, {threads} thread{'s'[: threads != 1]}, "
        f"{datetime.date.today()}.\n\n" + _table(["program", "batch", "ms"], rows)
    )
    made = ", ".join(f"{name} {number}" for name, number in config["versions"].items())
    lines.append(f"Made with `lightning-rkd export` ({made}).")
    return _join_paragraphs(lines) + "\n"


_HOW = {
    "student.safetensors": '`lightning_rkd.export.load("FOLDER")`',
    "student.pt2": '`torch.export.load("student.pt2").module()`',
    "student.onnx": '`onnxruntime.InferenceSession("student.onnx").run(None, {INPUTS})`',
    "config.json": "input, output and class of the network",
    "tokenizer.json": '`tokenizers.Tokenizer.from_file("tokenizer.json")`',
    "use.py": "`from use import embed`, with numpy and onnxruntime alone, and Pillow for images: `embed([item, ...])`",
}


def describe(value: Any) -> str:
    """Part of a configuration as YAML for the card, without arguments that are ``None``."""
    return "" if value is None else yaml.safe_dump(_drop_none(value), sort_keys=False, allow_unicode=True)


def _drop_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _drop_none(part) for name, part in value.items() if part is not None}
    return [_drop_none(part) for part in value] if isinstance(value, list) else value


def _describe_input(entry: Mapping[str, Any]) -> str:
    free = " and ".join(x for x in entry["shape"] if isinstance(x, str))
    text = f"({', '.join(map(str, entry['shape']))}), {entry['dtype']}, {free} any number"
    if "mean" not in entry:
        return text
    mean, std = (", ".join(f"{x:.4f}" for x in entry[name]) for name in ("mean", "std"))
    return f"{text}; pixels from 0 to 1, minus the mean ({mean}), divided by the standard deviation ({std})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _join_paragraphs(lines: Sequence[str]) -> str:
    """Paragraphs with a line between them; items of a list without."""
    text = lines[0]
    for before, line in itertools.pairwise(lines):
        text += ("\n" if before.startswith("- ") and line.startswith("- ") else "\n\n") + line
    return text


def measure_latency(network: nn.Module, example: dict[Any, Tensor], onnx: Path) -> list[tuple[str, int, float]]:
    """Median milliseconds of a call by program and batch size, of the network and of its ONNX program if it exists."""
    programs: dict[str, Callable[[Any], object]] = {"PyTorch": partial(call_network, network)}
    if onnx.is_file():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        programs["onnxruntime"] = lambda x: session.run(
            None, {name: one.numpy() for name, one in zip(names, x.values(), strict=True)}
        )
    found = []
    for program, call in programs.items():
        for batch in (1, 32):
            x = {name: one.expand(batch, *one.shape[1:]).contiguous() for name, one in example.items()}
            with torch.inference_mode():
                found.append((program, batch, measure_milliseconds(call, x)))
    return found


def measure_milliseconds(call: Callable[[Any], object], x: Any) -> float:
    """Median milliseconds of a call, of at least three, after a first one."""
    call(x)
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or (time.perf_counter() - start < SECONDS and len(seconds) < 50):
        before = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - before)
    return 1000 * float(torch.tensor(seconds).median())
