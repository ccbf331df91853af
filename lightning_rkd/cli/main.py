"""The program ``lightning-rkd``: LightningCLI with recipes, and further commands."""

import difflib
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from importlib import import_module

from lightning_rkd.cli import recipes
from lightning_rkd.cli.signals import TERMINATED, at_sigterm, end_with_first_rank
from lightning_rkd.utils.imports import MissingExtraError, check_installed

COMMANDS = {
    "demo": "Train a teacher, a student alone and a distilled student, and compare them.",
    "distill": "Compress a pretrained teacher into a small student, on your own images, texts or vectors.",
    "compare": "Train several networks with several seeds, and compare them in one table.",
    "export": "Export the student of a run: safetensors, torch.export, ONNX and a model card.",
    "cache": "Write the outputs of a recipe's teacher for every sample, so that training needs no teacher.",
}
"""Commands beside LightningCLI's; each is ``lightning_rkd.cli.commands.<name>.main(args)``."""

TRAINER = {
    "fit": "Train a recipe.",
    "validate": "Evaluate on the validation data.",
    "test": "Evaluate on the test data.",
    "predict": "Compute embeddings.",
}

PACKAGES = ("docstring_parser", "jsonargparse", "matplotlib", "pytorch_metric_learning", "rich", "scipy")
"""Packages of the extra ``cli``."""

TRACEBACK = "LIGHTNING_RKD_TRACEBACK"
"""Environment variable; 1 prints the traceback of an error."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM."""
    given = list(sys.argv[1:] if args is None else args)
    if os.getcwd() not in sys.path:  # classes of your own files, as with python -m
        sys.path.append(os.getcwd())
    with at_sigterm() as sigterm:
        code = _exit_code(given)
    if sigterm.is_set():  # it may have caused other errors
        code = TERMINATED
        print("terminated", file=sys.stderr)
    if code in (130, TERMINATED) and given[:1] == ["fit"]:
        print("(the same command with --ckpt_path last resumes from the last checkpoint)", file=sys.stderr)
    if code in (130, TERMINATED) and given[:1] == ["cache"]:
        print("(the same command resumes from the last complete file)", file=sys.stderr)
    return code


def _exit_code(args: list[str]) -> int:
    try:
        _command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        # Lightning answers Ctrl-C with exit code 1
        interrupted = isinstance(stop.__context__, KeyboardInterrupt)
        return 130 if interrupted else stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        usage = isinstance(error, ArgumentError | MissingExtraError | recipes.UnknownRecipeError)
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        known = usage or isinstance(error, ValueError | OSError)
        message = message if known and message else f"{type(error).__name__}: {message}"
        print("\n".join([f"error: {message}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        if not usage:
            print(f"({TRACEBACK}=1 prints the traceback)", file=sys.stderr)
        return 2 if usage else 1
    return 0


def _command(args: list[str]) -> None:
    first = args[0] if args else "--help"
    if first in ("-h", "--help"):
        print(_help())
    elif first == "--version":
        from lightning_rkd import __version__

        print(__version__)
    elif first in COMMANDS:
        check_installed(*PACKAGES, extra="cli")
        run: Callable[[list[str]], None] = import_module(f"lightning_rkd.cli.commands.{first}").main
        run(args[1:])
    elif first in TRAINER or first.startswith("-"):
        check_installed(*PACKAGES, extra="cli")
        _train(recipes.resolve(args))
    else:
        known = [*COMMANDS, *TRAINER]
        near = difflib.get_close_matches(first, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(known)}"
        raise ArgumentError(None, f"there is no command {first!r}; {hint}")


def _train(args: list[str]) -> None:
    with end_with_first_rank(), warnings.catch_warnings():
        # advice that does not apply to images in memory and to folders named by the user, and news about packages
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed from")
        warnings.filterwarnings("ignore", r"Starting from v1\.9\.0, `tensorboardX`")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        from lightning_rkd.cli.trainer import TrainingCLI

        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_without_advertisement)
        TrainingCLI(args, prog="lightning-rkd")


def _without_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def _help() -> str:
    def rows(table: dict[str, str]) -> str:
        width = max(map(len, table))
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in table.items())

    return f"""\
usage: lightning-rkd COMMAND [options]
       lightning-rkd COMMAND --help

Relational knowledge distillation for PyTorch Lightning.

commands:
{rows(COMMANDS)}

commands that run a Trainer on a recipe, --config NAME or FILE, which further options override:
{rows(TRAINER)}

recipes:
{rows({name: recipes.about(name) for name in recipes.names()})}

examples:
  lightning-rkd demo
  lightning-rkd fit --config glyphs_teacher
  lightning-rkd fit --config glyphs_rkd --model.loss RKDDistance --trainer.max_steps 200
  lightning-rkd fit --config glyphs_rkd --print_config > mine.yaml

options:
  -h, --help       Print this help.
  --version        Print the version.

Errors are one line; {TRACEBACK}=1 prints the traceback."""
