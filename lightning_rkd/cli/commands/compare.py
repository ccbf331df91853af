"""``lightning-rkd compare``: several ways to train, several seeds, one table."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lightning_rkd import plots
from lightning_rkd.cli.commands import options as kinds
from lightning_rkd.cli.experiments import tables, tuning
from lightning_rkd.cli.experiments.plan import TEACHER, Comparison, check, find, folder_of, names, read
from lightning_rkd.cli.experiments.progress import clock
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.tasks import LOG, Failure, Task, run_all, tasks_of, teacher_task
from lightning_rkd.cli.experiments.tuning import Trial
from lightning_rkd.cli.trainer import check_writable
from lightning_rkd.utils import provenance
from lightning_rkd.utils.files import write_whole

MADE_BY = "compare.yaml"
"""What was compared last; a folder that holds it is gone on with."""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: The comparison cannot be understood, or one of its networks cannot be built.
        OSError: An output folder that cannot be written, or that holds something else.
        SystemExit: With 1, if a run failed.
    """
    options = _parser().parse_args(args)
    path = find(options.config)
    comparison = read(path, seeds=options.seeds, steps=options.steps, settings=_settings(options.set))
    out = options.out or Path("runs", "compare", folder_of(path.stem))
    command = shlex.join(["lightning-rkd", "compare", *args])
    try:
        failed = compare(comparison, out, options.jobs, options.tune, command)
    except (KeyboardInterrupt, SystemExit):
        print(f"Stopped. The same command goes on from here: {command}")
        raise
    if failed:
        raise SystemExit(1)


def compare(
    comparison: Comparison, out: Path, jobs: int = 1, tune: Sequence[str] = (), command: str = ""
) -> list[Failure]:
    """Train what has not been trained, print the table, and leave table, plot, checkpoints and configurations.

    Args:
        comparison: What is compared.
        out: Output folder: a new one, or one of an earlier comparison, whose runs are used where they are the same.
        jobs: Runs at a time.
        tune: ``NETWORK.weight=0.5,1,2``: values of which the best on validation data is taken.
        command: For the header.

    Returns:
        The runs that failed.

    Raises:
        ValueError: A network cannot be built, or what is to be tuned does not fit.
        OSError: ``out`` cannot be written, or holds something that no comparison made.
    """
    console, start = Console(highlight=False, width=None if sys.stdout.isatty() else 160), time.perf_counter()
    kinds.check_folder(out, MADE_BY, "comparison")
    tried = tuning.trials(tuning.parse(tune, comparison), comparison)
    select = _select(comparison) if tried else ""
    teachers = [] if comparison.teacher is None else [comparison.teacher]
    check([*teachers, *comparison.networks])
    for trial in tried:
        check(comparison.changed(trial.entry, trial.settings).of(trial.entry)[:1])
    check_writable(out)
    write_whole(out / MADE_BY, _described(comparison, tune).encode())
    console.print(
        f"{comparison.title}: {len(comparison.networks)} networks, seeds {', '.join(map(str, comparison.seeds))}"
        f"{' and their teacher' if teachers else ''}; {jobs} at a time, in {out}",
        markup=False,
        soft_wrap=True,
    )
    commit = provenance.commit(Path(__file__).parent)
    trained = teacher_task(comparison)
    chosen: dict[str, Trial] = {}
    results: dict[str, Run | Failure] = {}
    if tried:
        fills = [
            t for e in {t.entry for t in tried} for t in tasks_of(comparison, comparison.of(e), comparison.seeds[:1])
        ]
        fills = list({t.folder: t for t in fills if t.fills}.values())
        results = run_all([*trained, *fills, *(t.task for t in tried)], out, jobs, console, commit)
        chosen = tuning.best(tried, results, select)
        _say_tuned(tried, results, chosen, select, out, console)
        for entry, trial in chosen.items():
            comparison = comparison.changed(entry, trial.settings)
            tuning.take_over(trial, out, comparison)
    tasks = [*trained, *tasks_of(comparison, comparison.networks, comparison.seeds)]
    results |= run_all(tasks, out, jobs, console, commit)
    _write(comparison, tasks, results, out, command, chosen, select, console)
    failed = [r for task in tasks if isinstance(r := results.get(task.folder), Failure)]
    for failure in failed:
        folder = out / failure.task.folder
        console.print(f"\nFAILED: {failure.task.name} ({folder}): {failure.error}", markup=False, soft_wrap=True)
        if failure.log:
            console.print(f"the last lines of {folder / LOG}:\n{failure.log}", markup=False, soft_wrap=True)
    if failed:
        console.print("\nThe same command tries again what has failed, and keeps what is finished.")
    console.print(f"It took {clock(time.perf_counter() - start)}. In {out} there are now", soft_wrap=True)
    for name, what in (
        ("table.md, table.csv, runs.csv", "the table, and every single run"),
        ("plot.png", "every run, means and intervals"),
        ("*/last.ckpt, */config.yaml", "the networks, and what lightning-rkd fit --config trains them with"),
    ):
        console.print(f"  {name:<30} {what}", soft_wrap=True)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-rkd compare",
        description="Train several networks with several seeds, and compare them in one table: mean, spread, and the "
        "difference to a baseline, seed by seed, with its 95 %% interval. What is finished is not done again.",
        epilog=f"""\
comparisons that come with the package:
  {", ".join(names())}

examples:
  lightning-rkd compare --config glyphs_losses
  lightning-rkd compare --config mine.yaml --jobs 4 --seeds 5
  lightning-rkd compare --config glyphs_losses --tune PKT.weight=3000,30000 --tune RKD-DA.weight=0.5,1,2
  lightning-rkd compare --config glyphs_losses --steps 50 --set trainer.accelerator=cpu --out runs/trial""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", required=True, metavar="NAME|FILE", help="what to compare, in YAML")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (runs/compare/NAME)")
    parser.add_argument("--jobs", type=kinds.positive, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--seeds", type=kinds.seeds, metavar="N|LIST", help="instead of the file's: 3, or 0,1,2")
    parser.add_argument("--steps", type=kinds.positive, metavar="N", help="training steps of each network")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a setting of all networks, the last word; of the teacher all but model...",
    )
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="NETWORK.weight=V,V",
        help="values to try with the first seed; the best on validation data is taken",
    )
    return parser


def _settings(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in given:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise argparse.ArgumentError(None, f"--set: expected PATH=VALUE, got {text!r}")
        found[path] = yaml.safe_load(value)
    return found


def _select(comparison: Comparison) -> str:
    select = comparison.select or next(iter(comparison.scores or ()), None)
    if select is None:
        raise ValueError("--tune needs a score to maximise on validation data: add select: NAME to the file")
    return select


def _described(comparison: Comparison, tune: Sequence[str]) -> str:
    from lightning_rkd import __version__

    about: dict[str, Any] = {
        "made_by": "lightning-rkd compare",
        "lightning_rkd": __version__,
        "torch": str(torch.__version__),
        "title": comparison.title,
        "seeds": list(comparison.seeds),
        "baseline": comparison.baseline,
        "tune": list(tune),
        "networks": {n.name: n.config for n in comparison.networks},
    }
    if comparison.teacher is not None:
        about["teacher"] = comparison.teacher.config
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)


def _write(
    comparison: Comparison,
    tasks: Sequence[Task],
    results: Mapping[str, Run | Failure],
    out: Path,
    command: str,
    chosen: Mapping[str, Trial],
    select: str,
    console: Console,
) -> None:
    scores = tables.scores_of(comparison, results)
    found = tables.rows(comparison, tasks, results, scores)
    tuned = [f"- {entry}: {trial.label}" for entry, trial in chosen.items()]
    parts = [
        f"# {comparison.title}",
        _header(comparison, tasks, results, command),
        tables.markdown(found, comparison, scores).rstrip(),
        tables.explanation(comparison),
    ]
    if tuned:
        seed = comparison.seeds[0]
        parts.append(f"Chosen on validation data with seed {seed}, by {select} (tune.csv):\n\n" + "\n".join(tuned))
    failures = [r for task in tasks if isinstance(r := results[task.folder], Failure)]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(f"- {f.task.name} (`{f.task.folder}`): {f.error}" for f in failures))
    write_whole(out / "table.md", ("\n\n".join(parts) + "\n").encode())
    tables.write_csv(found, comparison, scores, out / "table.csv")
    tables.write_runs_csv(tasks, results, scores, out / "runs.csv")
    shown = Table()
    for n, heading in enumerate(tables.headings(comparison, scores)):
        shown.add_column(heading, justify="right" if n else "left")
    for row in found:
        shown.add_row(*tables.cells(row, comparison, scores))
    console.print(shown)
    console.print(tables.explanation(comparison), markup=False)
    shares = [score for score in scores if any(row.values.get(score) for row in found)]
    if shares:
        values = {row.network: {s: list(row.values.get(s, {}).values()) for s in shares[:3]} for row in found}
        content = io.BytesIO()
        plots.comparison(values, baseline=comparison.baseline, title=comparison.title).savefig(content, format="png")
        write_whole(out / "plot.png", content.getbuffer())


def _header(comparison: Comparison, tasks: Sequence[Task], results: Mapping[str, Run | Failure], command: str) -> str:
    from lightning_rkd import __version__

    runs = [run for task in tasks if isinstance(run := results[task.folder], Run) and run.about]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(run.about[name] for run in runs if run.about.get(name)))

    days = sorted({run.about["date"] for run in runs})
    lines = {
        "command": f"`{command}`" if command else "",
        "trained": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        "hardware": all_of("hardware"),
        "commit": all_of("commit"),
        "versions": f"lightning-rkd {__version__}, PyTorch {torch.__version__}",
        "seeds": ", ".join(map(str, comparison.seeds))
        + (f" ({TEACHER}: {comparison.teacher_seed})" if comparison.teacher is not None else ""),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _say_tuned(
    tried: Sequence[Trial],
    results: Mapping[str, Run | Failure],
    chosen: Mapping[str, Trial],
    select: str,
    out: Path,
    console: Console,
) -> None:
    table, text = Table(title="tuned on validation data"), io.StringIO()
    for heading in ("network", "values", select, ""):
        table.add_column(heading, justify="right" if heading == select else "left")
    rows = csv.writer(text)
    rows.writerow(["network", "values", select, "chosen"])
    for trial in tried:
        score = tuning.score_of(trial, results, select)
        mark = "chosen" if chosen.get(trial.entry) is trial else ""
        table.add_row(trial.entry, trial.label, "failed" if score is None else f"{score:.4f}", mark)
        rows.writerow([trial.entry, trial.label, "" if score is None else score, mark])
    console.print(table)
    write_whole(out / "tune.csv", text.getvalue().encode())
