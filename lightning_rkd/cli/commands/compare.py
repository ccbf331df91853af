"""``lightning-rkd compare``: several networks, several seeds, one table."""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
import torch
import yaml
from rich.console import Console

from lightning_rkd import __version__, plots
from lightning_rkd.cli import recipes
from lightning_rkd.cli.commands import common
from lightning_rkd.cli.experiments import tables, tuning
from lightning_rkd.cli.experiments.plan import Comparison, check, folder_of, read
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.schedule import Failure, clock, run_all
from lightning_rkd.cli.experiments.tables import Table
from lightning_rkd.cli.experiments.tasks import tasks_of
from lightning_rkd.cli.experiments.tuning import Trial
from lightning_rkd.cli.trainer import check_writable
from lightning_rkd.plots.style import to_png
from lightning_rkd.utils import provenance
from lightning_rkd.utils.files import write_whole

MADE_BY = "compare.yaml"
"""File with the last comparison in an output folder; a folder that holds it is resumed."""

FILES = {
    "table.md, table.csv, runs.csv": "the table, and every single run",
    "plot.png": "every run, means and intervals",
    "*/last.ckpt, */config.yaml": "the networks, and their configurations for lightning-rkd fit --config",
}


def main(args: Sequence[str]) -> None:
    """Run the command; ``SystemExit(1)`` if a run failed."""
    options = _parser().parse_args(args)
    path = recipes.find(options.config, "comparison")
    changes = {} if options.seeds is None else {"seeds": options.seeds}
    settings = _settings(options.set) | ({"data.skip_damaged": True} if options.skip_damaged else {})
    comparison = read(path, options.steps, settings, changes)
    out = options.out or Path("runs", "compare", folder_of(path.stem))
    with common.resumable("compare", args) as command:
        common.check_folder(out, MADE_BY, "comparison")
        trials = tuning.plan_trials(options.tune, comparison)
        teachers = [] if comparison.teacher is None else [comparison.teacher]
        check([*teachers, *comparison.networks, *(trial.network for trial in trials)])
        check_writable(out)
        configs = {network.name: network.config for network in (*teachers, *comparison.networks)}
        about = {"made_by": command, "lightning_rkd": __version__, "torch": str(torch.__version__), "networks": configs}
        write_whole(out / MADE_BY, yaml.safe_dump(about, sort_keys=False, allow_unicode=True).encode())
        console = common.new_console()
        table = compare(comparison, out, console, command, options.jobs, trials)
        common.print_files(console, out, FILES)
    if table.failures:
        raise SystemExit(1)


def compare(
    comparison: Comparison, out: Path, console: Console, command: str, jobs: int = 1, trials: Sequence[Trial] = ()
) -> Table:
    """Train what has not been trained, print and write the table, and return it.

    Of ``trials`` the best on validation data is taken for each network; ``command`` is written above the table.
    """
    start, commit, networks = time.perf_counter(), provenance.commit(Path(__file__).parent), len(comparison.networks)
    console.print(
        f"{comparison.title}: {networks} networks, seeds {', '.join(map(str, comparison.seeds))}"
        f"{'' if comparison.teacher is None else ' and their teacher'}; {jobs} at a time, in {out}",
        markup=False,
        soft_wrap=True,
    )
    tuned: list[str] = []
    if trials:
        tasks = [*tasks_of(comparison, [], []), *(trial.task for trial in trials)]
        chosen = _choose(trials, run_all(tasks, out, jobs, console, commit), comparison.select or "", out, console)
        for entry, trial in chosen.items():
            comparison = comparison.with_settings(entry, tuning.in_config(trial.values))
            tuning.reuse(trial, out, comparison.seeds[0])
            tuned.append(f"- {entry}: {trial.label}")
    tasks = tasks_of(comparison, comparison.networks, comparison.seeds)
    results = run_all(tasks, out, jobs, console, commit)
    table = Table(tasks, results, comparison.scores, comparison.baseline)
    parts = [f"# {comparison.title}", _header(comparison, results, command), table.to_markdown(), table.caption]
    if tuned:
        seed = comparison.seeds[0]
        parts.append(f"Chosen on validation data with seed {seed}, by {comparison.select} (tune.csv):")
        parts.append("\n".join(tuned))
    if table.failures:
        failures = "\n".join(f"- {f.task.name} (`{f.task.folder}`): {f.error}" for f in table.failures)
        parts.append(f"Failed:\n\n{failures}")
    write_whole(out / "table.md", ("\n\n".join(parts) + "\n").encode())
    table.write_csv(out)
    plotted = [score for score in table.columns if any(row.values.get(score) for row in table.rows)][:3]
    if plotted:
        values = {row.network: {s: list(row.values.get(s, {}).values()) for s in plotted} for row in table.rows}
        plot = plots.comparison(values, baseline=comparison.baseline, title=comparison.title)
        write_whole(out / "plot.png", to_png(plot))
    _print(table, console)
    console.print(f"It took {clock(time.perf_counter() - start)}.")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = common.new_parser(
        "compare",
        "Train several networks with several seeds, and compare them in one table: mean, spread, and the difference to "
        "a baseline, seed by seed, with its 95 % interval. Finished runs are not repeated.",
        f"""\
comparisons that come with the package:
  {", ".join(recipes.names("comparison"))}

examples:
  lightning-rkd compare --config glyphs_losses
  lightning-rkd compare --config mine.yaml --jobs 4 --seeds 5
  lightning-rkd compare --config glyphs_losses --tune PKT.weight=3000,30000 --tune RKD-DA.weight=0.5,1,2
  lightning-rkd compare --config glyphs_losses --steps 50 --set trainer.accelerator=cpu --out runs/trial""",
    )
    add = parser.add_argument
    add("--config", "-c", required=True, metavar="NAME|FILE", help="comparison, in YAML")
    add("--out", type=Path, metavar="FOLDER", help="output folder (default: runs/compare/NAME)")
    add("--jobs", type=common.positive, default=1, metavar="N", help="number of runs at a time (default: 1)")
    add("--seeds", type=common.seeds, metavar="N|LIST", help="number of seeds, or their list; replaces the file's")
    add("--steps", type=common.positive, metavar="N", help="training steps of each network")
    every = "setting of all networks, which overrides the file; the teacher takes all except model..."
    add("--set", action="append", default=[], metavar="PATH=VALUE", help=every)
    skip = "leave out images that cannot be read, where the data module has skip_damaged"
    add("--skip-damaged", action="store_true", help=skip)
    tune = "values to try with the first seed; the best on validation data is taken"
    add("--tune", action="append", default=[], metavar="NETWORK.weight=V,V", help=tune)
    return parser


def _settings(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in given:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise argparse.ArgumentError(None, f"--set: expected PATH=VALUE, got {text!r}")
        found[path] = yaml.safe_load(value)
    return found


def _choose(
    trials: Sequence[Trial], results: Mapping[str, Run | Failure], select: str, out: Path, console: Console
) -> dict[str, Trial]:
    """Choose by entry the trial with the highest score, if any has one; print all and write them into ``tune.csv``."""
    scores = [trial.score(results, select) for trial in trials]
    best, chosen = dict[str, float](), dict[str, Trial]()
    for trial, score in zip(trials, scores, strict=True):
        if score is not None and score > best.get(trial.network.entry, -math.inf):
            best[trial.network.entry], chosen[trial.network.entry] = score, trial
    lines: list[list[object]] = [["network", "values", select, "chosen"]]
    table = rich.table.Table("network", "values", select, "", title="tuned on validation data")
    for trial, score in zip(trials, scores, strict=True):
        mark = "chosen" if chosen.get(trial.network.entry) is trial else ""
        table.add_row(trial.network.entry, trial.label, "failed" if score is None else f"{score:.4f}", mark)
        lines.append([trial.network.entry, trial.label, "" if score is None else score, mark])
    console.print(table)
    tables.write_csv(lines, out / "tune.csv")
    return chosen


def _header(comparison: Comparison, results: Mapping[str, Run | Failure], command: str) -> str:
    about = [run.about for run in results.values() if isinstance(run, Run) and run.about]
    days = sorted({entry["date"] for entry in about})
    teacher = "" if comparison.teacher is None else f" (teacher: {comparison.teacher_seed})"
    lines = {
        "command": f"`{command}`",
        "trained": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        **{name: ", ".join(dict.fromkeys(e[name] for e in about if e.get(name))) for name in ("hardware", "commit")},
        "versions": f"lightning-rkd {__version__}, PyTorch {torch.__version__}",
        "seeds": ", ".join(map(str, comparison.seeds)) + teacher,
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _print(table: Table, console: Console) -> None:
    printed = rich.table.Table()
    for number, heading in enumerate(table.headings):
        printed.add_column(heading, justify="right" if number else "left")
    for row in table.rows:
        printed.add_row(*table.cells(row))
    console.print(printed)
    console.print(table.caption, markup=False)
    for failure in table.failures:
        console.print(f"\nFAILED: {failure.task.name}: {failure.error}", markup=False, soft_wrap=True)
        if failure.tail:
            console.print(f"the last lines of {failure.log}:\n{failure.tail}", markup=False, soft_wrap=True)
    if table.failures:
        console.print("\nThe same command tries the failed runs again, and keeps the finished ones.")
