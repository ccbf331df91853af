"""Plants small errors in a copy of the package and looks whether the quick tests notice.

    python benchmarks/mutants.py --number 60 --seed 0

A mutant changes one operator, comparison, constant, ``not`` or the order of two arguments in losses, metrics,
functional, distillation or callbacks. Its own tests run first (``losses/irg.py``: ``tests/losses/test_irg.py``,
``test_oracles.py``, ``test_details.py`` and the examples in its docstrings), then those of its folder, then those
of the engine and parity. A test that fails, or that does not end, kills it.
Survivors are listed at the end: each is a missing test, or a change that makes no difference.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("losses", "metrics", "functional", "distillation", "callbacks")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
LAST = ("tests/distillation", "tests/modules", "tests/callbacks", "tests/parity", "tests/utils/test_distributed.py")


@dataclass(frozen=True)
class Mutant:
    """One changed place: ``new`` stands for ``old`` between two offsets in the file."""

    file: str
    line: int
    start: int
    stop: int
    old: str
    new: str

    def __str__(self) -> str:
        change = " ".join(self.old.split()), " ".join(self.new.split())
        return f"{self.file}:{self.line}: {change[0]}  ->  {change[1]}"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions that may take the place of this one."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.BinOp | ast.BoolOp) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()  # type: ignore[assignment]
    elif isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        new = new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        new.value = new.value + 1 if isinstance(new.value, int) else 2 * new.value or 1.0
    elif isinstance(new, ast.Call) and len(new.args) > 1 and not any(isinstance(a, ast.Starred) for a in new.args[:2]):
        new.args[:2] = new.args[1::-1]
    else:
        return
    yield new


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Every expression that is run; not annotations, messages, decorators and type aliases."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from expressions(child)


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Every mutant of a file."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in expressions(ast.parse(source)):
        for new in changes(node):
            assert isinstance(node, ast.expr)
            start = starts[node.lineno - 1] + node.col_offset
            stop = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            text = (
                f"({ast.unparse(new)})" if isinstance(new, ast.BinOp | ast.BoolOp | ast.Compare) else ast.unparse(new)
            )
            name = file.relative_to(ROOT).as_posix()
            yield Mutant(name, node.lineno, start, stop, source[start:stop].decode(), text)


def tests_for(mutant: Mutant, tree: Path) -> list[list[str]]:
    """Groups of tests, in the order in which they are run."""
    path = Path(mutant.file)
    folder = Path("tests", *path.parts[1:-1])
    while not (tree / folder).is_dir():
        folder = folder.parent
    names = (f"test_{path.stem.strip('_')}.py", "test_oracles.py", "test_details.py")
    own = [str(folder / name) for name in names if (tree / folder / name).is_file()]
    top = f"tests/{path.parts[1]}"
    return [[*own, mutant.file], [top], [part for part in LAST if part != top]]


def fate(mutant: Mutant, tree: Path, limit: float) -> str:
    """The test that kills the mutant, or an empty string where it survives."""
    file = tree / mutant.file
    sound = file.read_bytes()
    file.write_bytes(sound[: mutant.start] + mutant.new.encode() + sound[mutant.stop :])
    own = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        for group in tests_for(mutant, tree):
            command = [sys.executable, "-m", "pytest", "-qx", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider"]
            command += ["-m", "not slow and not campaign", *group]
            try:
                done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                return f"{limit:.0f} s have passed"
            if done.returncode not in (0, 5):  # 5: nothing was collected
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0] if failed else f"exit code {done.returncode}"
        return ""
    finally:
        file.write_bytes(sound)


def main() -> int:
    """Plant, test, and print the table; 1 if a mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", help="only files with this in their path")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a group of tests")
    args = parser.parse_args()
    files = [f for folder in FOLDERS for f in sorted((ROOT / "lightning_rkd" / folder).rglob("*.py"))]
    files = [f for f in files if args.only in str(f) and not f.stem.endswith("_cuda")]  # those need a GPU
    every = [mutant for file in files for mutant in mutants_of(file)]
    chosen = random.Random(args.seed).sample(every, min(args.number, len(every)))
    print(f"{len(chosen)} of {len(every):,} mutants in {len(files)} files, seed {args.seed}", flush=True)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "site", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, tree, ignore=skipped)
        for number, mutant in enumerate(chosen, start=1):
            start = time.monotonic()
            killer = fate(mutant, tree, args.limit)
            survivors += [] if killer else [mutant]
            seconds = time.monotonic() - start
            print(f"{number:3} {seconds:4.0f} s  {mutant}\n           {killer or 'SURVIVES'}", flush=True)
    killed = len(chosen) - len(survivors)
    print(f"\n{killed} of {len(chosen)} killed ({killed / max(1, len(chosen)):.0%}); survivors:")
    print(*(survivors or ["none"]), sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
