"""``lightning-rkd export``: the student of a run, for production."""

import argparse
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from torch import Tensor

from lightning_rkd.cli.commands import common
from lightning_rkd.cli.experiments.runs import RESULT, digest, read_file
from lightning_rkd.cli.trainer import check_checkpoint, import_public_classes
from lightning_rkd.data.datamodules.base import ImageDataModule
from lightning_rkd.distillation import pooling
from lightning_rkd.export.card import Facts, describe
from lightning_rkd.export.formats import FORMATS
from lightning_rkd.export.preprocess import ImagePreprocess
from lightning_rkd.export.read import build_network
from lightning_rkd.export.write import export
from lightning_rkd.utils.types import name_arguments


def main(args: Sequence[str]) -> None:
    """Run the command; ``SystemExit(1)`` if a format could not be exported."""
    options = _parser().parse_args(list(args))
    config_path = options.config or _find_config(options.run)
    checkpoint = options.ckpt_path or options.run / "last.ckpt"
    if options.config is None and (options.run / "distill.yaml").is_file():
        raise ValueError(
            f"the student of {str(options.run)!r} is exported already, in {str(options.run / 'student')!r}; the same "
            f"lightning-rkd distill with --formats {','.join(FORMATS)} adds formats and trains nothing again"
        )
    for path, kind in ((config_path, "configuration"), (checkpoint, "checkpoint")):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {kind} {str(path)!r}: give the folder of a run of lightning-rkd fit, demo or compare, "
                "which holds config.yaml and last.ckpt, or name the file"
            )
    check_checkpoint(checkpoint)
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    model = (config.get("model") if isinstance(config, dict) else None) or {}
    model = (model.get("init_args") if isinstance(model, dict) else None) or {}
    if not isinstance(model.get("student"), dict):
        raise ValueError(
            f"{str(config_path)!r} has no model.init_args.student: the command exports runs of DistillationModule; "
            "lightning_rkd.export.export takes any network"
        )
    parser, parsed = _parse(torch.nn.Module, "student", model["student"])
    student: dict[str, Any] = yaml.safe_load(parser.dump(parsed))["student"]
    network = build_network(student)
    load_student(network, checkpoint)
    if options.tokens is None:
        example, preprocess = _example(options.input, config, config_path)
    else:
        example, preprocess = _make_tokens(options.tokens, model.get("inputs")), None
    facts = _collect_facts(options.name, config, model, checkpoint, digest(*network.state_dict().values()))
    done = export(
        network,
        example,
        options.out,
        read=_find_read(options.read, model.get("student_layer")),
        formats=options.formats.split(","),
        build=student,
        preprocess=preprocess,
        facts=facts,
        overwrite=options.overwrite,
    )
    console = common.new_console()
    console.print(f"Files in {done.folder}:", markup=False, soft_wrap=True)
    for name, size in done.files.items():
        console.print(f"  {name:<22} {size:>12,} bytes")
    for name, difference in done.differences.items():
        console.print(f"{FORMATS[name]} differs from the student by at most {difference:.0e} of its largest output.")
    for name, why in done.failed.items():
        console.print(f"Not exported: {name}: {why}", markup=False, soft_wrap=True)
    if done.failed:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = common.new_parser(
        "export",
        "Export the student of a run: its weights and configuration, a program for PyTorch and one in ONNX, each "
        "compared with the student, and a model card. They need neither teacher nor Lightning.",
        """\
examples:
  lightning-rkd export runs/demo/rkd-0 --out exported
  lightning-rkd export --config mine.yaml --ckpt_path runs/mine/best.ckpt --out exported --formats torch,onnx""",
    )
    add = parser.add_argument
    add("run", type=Path, nargs="?", default=Path(), help="folder of a run (default: the current one)")
    add("--config", type=Path, metavar="FILE", help="configuration (default: RUN/config.yaml)")
    add("--ckpt_path", type=Path, metavar="FILE", help="checkpoint (default: RUN/last.ckpt)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="output folder")
    add("--formats", default=",".join(FORMATS), metavar="LIST", help="comma-separated formats (default: %(default)s)")
    add("--input", metavar="C,H,W", help="shape of one input, if the run's data are not available")
    add("--tokens", type=int, metavar="T", help="number of tokens in a text, for a student of token ids")
    add("--read", help="field of the student's output, or function that pools it (default: that of student_layer)")
    add("--name", help="name of the student on the card")
    add("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def _find_config(run: Path) -> Path:
    """The configuration beside the checkpoint, or in the newest folder of the run's logger."""
    beside = run / "config.yaml"
    logged = [path for path in run.glob("*/version_*/config.yaml") if path.is_file()]
    return beside if beside.is_file() or not logged else max(logged, key=lambda path: path.stat().st_mtime_ns)


def _parse(base: type, name: str, description: dict[str, Any]) -> tuple[jsonargparse.ArgumentParser, Any]:
    """Parse a part of a configuration as ``fit`` does, with short names of classes."""
    import_public_classes()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, name)
    return parser, parser.parse_object({name: description})


def load_student(network: torch.nn.Module, path: Path) -> None:
    """Load the student's weights from a checkpoint of the module."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "state_dict" not in state:
        raise ValueError(f"{str(path)!r} is no checkpoint of Lightning: it holds no state_dict")
    own = {name.removeprefix("student."): x for name, x in state["state_dict"].items() if name.startswith("student.")}
    own = {name.replace("_orig_mod.", ""): x for name, x in own.items()}  # of a compiled student
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {str(path)!r} does not fit the configuration's student: {lines}") from error


def _make_tokens(length: int, inputs: Any) -> Any:
    """Tokens of one text for all inputs that the configuration names."""
    tokens = torch.ones(1, length, dtype=torch.int64)
    if isinstance(inputs, list):
        inputs = name_arguments("inputs", inputs)
    return dict.fromkeys(inputs, tokens) if isinstance(inputs, dict) else tokens


def _find_read(read: str | None, layer: Any) -> Any:
    """Field or function that reads the student's output, from the option or the configuration's student layer."""
    if read is None and isinstance(layer, dict):
        own = layer.get("init_args") or {}
        read = None if own.get("layer") else own.get("read")
    if read is None or "." not in read:
        return getattr(pooling, read or "", read)
    return pkgutil.resolve_name(read)


def _example(shape: str | None, config: dict[str, Any], path: Path) -> tuple[Tensor, ImagePreprocess | None]:
    """An input of the right shape, and the preprocessing of images: as given, or from the run's data."""
    if shape is not None:
        try:
            return torch.zeros(1, *(int(part) for part in shape.split(","))), None
        except (ValueError, RuntimeError):
            raise argparse.ArgumentError(None, f"--input: expected a shape such as 3,32,32, got {shape!r}") from None
    try:
        parser, parsed = _parse(ImageDataModule, "data", config["data"])
        data: ImageDataModule = parser.instantiate(parsed).data
        data.prepare_data()
        data.setup("test")
        (_, *size), whole = data.image_shape, data.root.images.shape[-1]
        mean, std = (tuple(x.flatten().tolist()) for x in (data.root.mean, data.root.std))
        preprocess = ImagePreprocess((size[0], size[1]), mean, std, size[1] / whole, "bilinear", "stretch")
        return torch.zeros(1, *data.image_shape), preprocess
    except Exception as error:  # data of another kind, or no longer there
        raise ValueError(
            f"the shape of the input could not be read from the data in {str(path)!r} ({error}): give it, "
            "--input 3,32,32"
        ) from error


def _collect_facts(
    name: str | None, config: dict[str, Any], model: dict[str, Any], checkpoint: Path, weights: str
) -> Facts:
    scores: dict[str, float] = {}
    measured, result = "", checkpoint.parent / RESULT
    if result.is_file():
        kept = read_file(result, "delete it, and the card is written without scores")
        if kept["weights"] == weights:  # the scores of other weights do not count
            about = [kept["about"][key] for key in ("date", "hardware") if kept["about"].get(key)]
            scores, measured = kept["scores"], ", ".join(["On the run's test data, after the last step", *about]) + "."
    taught = model.get("teacher") is not None and model.get("loss") is not None  # a teacher alone is only compared with
    arguments = (("loss", "weight", "balance") if taught else ()) + ("task_loss", "task_weight")
    return Facts(
        name=name or checkpoint.parent.name or "student",
        data=describe(config["data"]) if config.get("data") else "",
        teacher=describe(model["teacher"]) if taught else "none",
        loss=describe({argument: model.get(argument) for argument in arguments}),
        scores=scores,
        scores_of=measured,
    )
