"""``lightning-rkd export``: the student of a run alone, for production."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from rich.console import Console
from torch import Tensor

from lightning_rkd.cli.experiments.runs import RESULT, digest
from lightning_rkd.cli.trainer import check_checkpoint, import_public_classes
from lightning_rkd.data.datamodules.base import ImageDataModule
from lightning_rkd.export.card import Facts, describe
from lightning_rkd.export.read import build_network
from lightning_rkd.export.write import FORMATS, export

_PREFIX = "student."


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: A configuration or a checkpoint that does not fit.
        OSError: A missing file, or an output folder that holds something else.
    """
    options = _parser().parse_args(list(args))
    config_path = options.config or _config_of(options.run)
    checkpoint_path = options.ckpt_path or options.run / "last.ckpt"
    for path, what in ((config_path, "configuration"), (checkpoint_path, "checkpoint")):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {what} {str(path)!r}: give the folder of a run, as lightning-rkd fit, demo and compare "
                "leave it with config.yaml and last.ckpt, or name the file"
            )
    check_checkpoint(checkpoint_path)
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    model = (config.get("model") if isinstance(config, dict) else None) or {}
    model = (model.get("init_args") if isinstance(model, dict) else None) or {}
    if not isinstance(model.get("student"), dict):
        raise ValueError(
            f"{str(config_path)!r} has no model.init_args.student: only runs of DistillationModule can be exported by "
            "command; lightning_rkd.export.export takes any network"
        )
    student = _student(model["student"])
    network = build_network(student)
    _fill(network, checkpoint_path)
    example, scaling = _input(options, config, config_path)
    done = export(
        network,
        example,
        options.out,
        formats=options.formats.split(","),
        build=student,
        input_scaling=scaling,
        facts=_facts(options, config, model, checkpoint_path, digest(*network.state_dict().values())),
        overwrite=options.overwrite,
    )
    console = Console(highlight=False)
    console.print(f"In {done.folder} there are now", markup=False, soft_wrap=True)
    for name, size in done.files.items():
        console.print(f"  {name:<22} {size:>12,} bytes")
    for name, difference in done.differences.items():
        console.print(f"{FORMATS[name]} gives the student's numbers to {difference:.0e} of the largest.")
    for name, why in done.failed.items():
        console.print(f"Not exported: {name}: {why}", markup=False, soft_wrap=True)
    if done.failed:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-rkd export",
        description="Write the student of a run alone: weights with what builds the network, a program for PyTorch, "
        "one in ONNX, each compared with the student, and a model card. They need neither teacher nor Lightning.",
        epilog="""\
examples:
  lightning-rkd export runs/demo/rkd-0 --out exported
  lightning-rkd export --config mine.yaml --ckpt_path runs/mine/best.ckpt --out exported --formats torch,onnx""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path(), help="folder that a training has left")
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of RUN/config.yaml")
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="instead of RUN/last.ckpt")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), metavar="LIST", help=f"some of {','.join(FORMATS)} (all)"
    )
    parser.add_argument(
        "--input", metavar="C,H,W", help="shape of one input, where the data of the run are not at hand"
    )
    parser.add_argument("--name", help="of the student, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def _config_of(run: Path) -> Path:
    """Where a run has kept its configuration: beside its checkpoint, or in the newest folder of its logger."""
    beside = run / "config.yaml"
    logged = [path for path in run.glob("*/version_*/config.yaml") if path.is_file()]
    if beside.is_file() or not logged:
        return beside
    return max(logged, key=lambda path: path.stat().st_mtime_ns)


def _parsed(base: type, name: str, description: dict[str, Any]) -> tuple[jsonargparse.ArgumentParser, Any]:
    """A part of a configuration, understood as ``fit`` does: short names of classes are known."""
    import_public_classes()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, name)
    return parser, parser.parse_object({name: description})


def _student(description: dict[str, Any]) -> dict[str, Any]:
    """The student of a configuration with whole class paths, also where it was written by hand with short names."""
    parser, parsed = _parsed(torch.nn.Module, "student", description)
    student: dict[str, Any] = yaml.safe_load(parser.dump(parsed))["student"]
    return student


def _fill(network: torch.nn.Module, path: Path) -> None:
    """The student's weights out of a checkpoint of the module."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "state_dict" not in state:
        raise ValueError(f"{str(path)!r} is no checkpoint of Lightning: it holds no state_dict")
    state = state["state_dict"]
    own = {name.removeprefix(_PREFIX): x for name, x in state.items() if name.startswith(_PREFIX)}
    own = {name.replace("_orig_mod.", ""): x for name, x in own.items()}  # of a compiled student
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {str(path)!r} does not fit the configuration's student: {lines}") from error


def _input(
    options: argparse.Namespace, config: dict[str, Any], path: Path
) -> tuple[Tensor, dict[str, list[float]] | None]:
    """An input of the right shape, and how images are normalised: from the run's data, or as told."""
    if options.input is not None:
        try:
            shape = tuple(int(part) for part in options.input.split(","))
            return torch.zeros(1, *shape), None
        except (ValueError, RuntimeError):
            raise argparse.ArgumentError(
                None, f"--input: expected a shape such as 3,32,32, got {options.input!r}"
            ) from None
    try:
        data = _data(config["data"])
        data.prepare_data()
        data.setup("test")
        scaling = {name: getattr(data.root, name).flatten().tolist() for name in ("mean", "std")}
        return torch.zeros(1, *data.image_shape), scaling
    except Exception as error:  # data that are gone, or of another kind, are no reason not to export
        raise ValueError(
            f"the shape of the input could not be read off the data in {str(path)!r} ({error}): give it, "
            "--input 3,32,32"
        ) from error


def _data(config: dict[str, Any]) -> ImageDataModule:
    parser, parsed = _parsed(ImageDataModule, "data", config)
    data: ImageDataModule = parser.instantiate_classes(parsed).data
    return data


def _facts(
    options: argparse.Namespace, config: dict[str, Any], model: dict[str, Any], checkpoint: Path, weights: str
) -> Facts:
    scores: dict[str, float] = {}
    told = ""
    result = checkpoint.parent / RESULT
    kept = None
    if result.is_file():
        check_checkpoint(result)
        kept = torch.load(result, map_location="cpu", weights_only=True)
    if kept is not None and kept["weights"] == weights:  # else they were measured with other weights
        scores, about = kept["scores"], kept["about"]
        told = (
            ", ".join(
                [
                    "On the run's test data, after the last step",
                    *filter(None, (about.get("date"), about.get("hardware"))),
                ]
            )
            + "."
        )
    taught = model.get("teacher") is not None
    parts = {name: model.get(name) for name in (("loss", "weight", "balance") if taught else ())}
    parts |= {name: model.get(name) for name in ("task_loss", "task_weight")}
    return Facts(
        name=options.name or checkpoint.parent.name or "student",
        data=describe(config["data"]) if config.get("data") else "",
        teacher=describe(model["teacher"]) if taught else "none",
        loss=describe(parts),
        scores=scores,
        scores_of=told,
    )
