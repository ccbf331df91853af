"""The tables of docs/results.md: every comparison in benchmarks/results/, run by ``lightning-rkd compare``.

The long studies in benchmarks/studies/ keep a line of a CSV file for each run and go on where they stopped, in a fresh
clone after the runs in docs/results:
``python benchmarks/results.py --only text --data FOLDER``, with archives as in benchmarks/distill.py and
``clinc150.zip`` (``data_full.json`` of clinc/oos-eval).

Run ``python benchmarks/results.py`` in a folder that holds ``data/cifar100/{train,test}/<class>/*.png`` (all of
CIFAR-100) and ``data/omniglot/<alphabet>/<character>/*.png`` (eight of Omniglot's alphabets: Balinese, Early Aramaic,
Greek, Japanese katakana, Korean, Latin, Sanskrit, Tagalog). Whatever is finished is not trained again; a new loss in
one of the files is trained and added. ``--page`` only writes the page anew from the tables that lie in docs/results.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from studies.images import ImageStudy
from studies.park import ParkStudy
from studies.report import describe, draw, name_loss, tabulate, to_cells
from studies.runner import read_rows, run_study
from studies.text import TextStudy

import lightning_rkd.losses
from lightning_rkd.cli.experiments.report import to_png
from lightning_rkd.utils.files import write_whole
from lightning_rkd.utils.statistics import Difference, paired_difference

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks" / "results"
TABLES = ROOT / "docs" / "results"
PAGE = TABLES.with_suffix(".md")
OUT = Path("runs", "results")
BALANCES = "0.5,2,8"
"""Tried for every entry that has a ``balance``: how many times as long as the task's gradient the loss's is."""

LONG = {"text": TextStudy, "park": ParkStudy, "images": ImageStudy}
"""Studies with a queue of many short runs, which a stopped command goes on with."""

STUDIES = ("retrieval", "generations", "classification", "similarity_transfer", "few_shot")
"""In the order of the page."""


Setting = tuple[str, str, str, str]
"""Study, score, beginning of the names of its networks, and words."""


@dataclass(frozen=True)
class Claim:
    """A paper's claim, as a difference between two rows of a table."""

    words: str
    setting: Setting
    better: str
    worse: str


R1, WAYS = "recall_at_1", "few_shot_accuracy_20_way_1_shot"
COLD = "CSD(student_temperature={0}, teacher_temperature={0})"
HELPS, BOTH = "RKD-DA helps the student", "Distances and angles beat distances alone"
DARK, RELAXED = "RKD-DA beats HardDarkRank", "RelaxedContrastive beats RKD-DA"
ANCHORED, MIXTURE = "CSD beats RKD-DA if the teacher is far stronger", "RKD-DA beside CSD beats CSD alone"
WITHOUT = "RKD-DA is better without the task's loss"
SELF, SECOND = "A self-distilled student beats its teacher", "A second generation beats the first"

BANKING: Setting = ("text", R1, "banking77 36k: ", "Banking77, 36k")
CLINC: Setting = ("text", R1, "clinc150 36k: ", "CLINC150, 36k")
PARK: Setting = ("park", R1, "cifar100 64: ", "CIFAR-100 unseen classes, a teacher trained alike")
IMAGES: Setting = ("images", R1, "unlabelled 1280: ", "CIFAR-100 unseen classes, EfficientNet-Lite0")
RETRIEVAL: Setting = ("retrieval", R1, "", "CIFAR-100 unseen classes, short trainings")
GENERATIONS: Setting = ("generations", R1, "", "CIFAR-100 unseen classes, short trainings")
CLASSES: Setting = ("classification", "accuracy", "", "CIFAR-100, less than an epoch")
MIXED: Setting = ("similarity_transfer", "accuracy", "", "CIFAR-100, less than an epoch")
FEW: Setting = ("few_shot", WAYS, "", "Omniglot, 1,900 parameters")
CLAIMS = (
    *(Claim(HELPS, setting, "RKD + triplet", "triplet") for setting in (BANKING, CLINC, PARK)),
    Claim(HELPS, RETRIEVAL, "RKD-DA alone", "student alone"),
    Claim(HELPS, RETRIEVAL, "RKD-DA + triplet", "student alone"),
    *(Claim(HELPS, setting, "RKD-DA", "student alone") for setting in (RETRIEVAL, CLASSES, FEW)),
    *(Claim(BOTH, setting, "RKD", "RKDDistance") for setting in (BANKING, CLINC, PARK)),
    Claim(BOTH, RETRIEVAL, "RKD-DA alone", "RKD-D alone"),
    Claim(BOTH, RETRIEVAL, "RKD-DA + triplet", "RKD-D + triplet"),
    Claim(BOTH, RETRIEVAL, "RKD-DA", "RKD-D"),
    Claim(BOTH, CLASSES, "RKD-DA", "RKD-D"),
    *(Claim(WITHOUT, setting, "RKD", "RKD + triplet") for setting in (BANKING, CLINC, PARK)),
    Claim(WITHOUT, RETRIEVAL, "RKD-DA alone", "RKD-DA + triplet"),
    Claim(SELF, PARK, "RKD of generation 1", "triplet"),
    Claim(SELF, GENERATIONS, "generation 1", "teacher"),
    Claim("A self-distilled student beats its like trained alone", GENERATIONS, "generation 1", "trained alone"),
    Claim(SECOND, PARK, "RKD of generation 2", "RKD of generation 1"),
    Claim(SECOND, GENERATIONS, "generation 2", "generation 1"),
    *(Claim(DARK, setting, "RKD", "HardDarkRank") for setting in (BANKING, CLINC)),
    Claim(DARK, RETRIEVAL, "RKD-DA", "HardDarkRank"),
    *(Claim(RELAXED, setting, "RelaxedContrastive", "RKD") for setting in (BANKING, CLINC, IMAGES)),
    Claim(RELAXED, RETRIEVAL, "RelaxedContrastive", "RKD-DA"),
    *(Claim(ANCHORED, setting, COLD.format(0.1), "RKD") for setting in (BANKING, CLINC)),
    Claim(ANCHORED, IMAGES, COLD.format(0.05), "RKD"),
    *(Claim(MIXTURE, setting, f"3 * RKD + {COLD.format(0.1)}", COLD.format(0.1)) for setting in (BANKING, CLINC)),
    Claim(MIXTURE, IMAGES, f"3 * RKD + {COLD.format(0.05)}", COLD.format(0.05)),
    Claim("Soft targets with RKD-DA beat soft targets", CLASSES, "SoftTarget + RKD-DA", "SoftTarget"),
    Claim("STKD beats soft targets", MIXED, "STKD", "SoftTarget"),
    Claim("STKD beats mixup without a teacher", MIXED, "STKD", "student alone, mixup"),
)


def command(study: str, jobs: int) -> list[str]:
    """Command that trains a comparison."""
    file = HERE / f"{study}.yaml"
    entries = yaml.safe_load(file.read_text())["networks"]
    tune = [f"--tune={name}.balance={BALANCES}" for name, entry in entries.items() if "balance" in (entry or {})]
    place = file.relative_to(ROOT) if Path.cwd() == ROOT else file
    return ["lightning-rkd", "compare", f"--config={place}", f"--out=runs/results/{study}", f"--jobs={jobs}", *tune]


def train(study: str, jobs: int) -> None:
    """Train a study and copy its tables into docs/results."""
    words = command(study, jobs)
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True)
    TABLES.mkdir(exist_ok=True)
    out = OUT / study
    for name, suffix in (("table.md", "md"), ("runs.csv", "csv"), ("plot.png", "png")):
        shutil.copy(out / name, TABLES / f"{study}.{suffix}")


def runs(study: str) -> dict[str, dict[str, dict[int, float]]]:
    """By network, score and seed."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    with (TABLES / f"{study}.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            for name, text in line.items():
                if name not in ("network", "seed", "folder", "parameters", "error") and text:
                    found.setdefault(line["network"], {}).setdefault(name, {})[int(line["seed"])] = float(text)
    return found


def long_runs(study: str) -> dict[str, dict[str, dict[int, float]]]:
    """The same of a long study; names are those of data, student and losses."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_rows(TABLES / f"{study}.csv"):
        if row["stage"] == "final" and row["student"] != "teacher":
            losses = " + ".join(name for name in (row["loss"], row["beside"]) if name != "none")
            scores = found.setdefault(f"{row['data']} {row['student']}: {losses}", {})
            for score in LONG[study].scores:
                if row[score]:
                    scores.setdefault(score, {})[int(row["seed"])] = float(row[score])
    return found


def checked(claim: Claim, known: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]) -> list[list[str]]:
    """The row of a claim, none where runs are missing. A single teacher is compared with the students of all seeds."""
    study, score, start, words = claim.setting
    better, worse = (known.get(study, {}).get(start + name, {}).get(score, {}) for name in (claim.better, claim.worse))
    if claim.worse == "teacher":
        worse = {seed: value for seed in better for value in worse.values()}
    found = paired_difference(better, worse)
    if found is None:
        return []
    interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    names = " - ".join(map(name_loss, (claim.better, claim.worse)))
    seeds = str(len(better.keys() & worse.keys()))
    return [[claim.words, words, names, score.removeprefix("few_shot_"), seeds, interval, verdict(found)]]


def verdict(found: Difference) -> str:
    """Whether a claim holds here."""
    if math.isnan(found.low) or found.low <= 0 <= found.high:
        return "not decided, " + ("better" if found.mean > 0 else "worse") + " on average"
    return "**holds**" if found.low > 0 else "**does not hold**"


def published(studies: Mapping[str, Any]) -> list[list[str]]:
    """Published results of the losses in the tables, in other settings."""
    names = {name for study in studies for name in re.findall(r"\w+", (HERE / f"{study}.yaml").read_text())}
    cards = {name: getattr(lightning_rkd.losses, name) for name in lightning_rkd.losses.__all__ if name in names}
    return [
        [f"[`{name}`](losses.md#{name.lower()})", cls.reference.result]
        for name, cls in sorted(cards.items())
        if isinstance(cls, type) and getattr(cls, "reference", None) is not None and cls.reference.result
    ]


def long_section(study: str, remarks: str) -> list[str]:
    """Tables and figures of a long study, and its figures' files, from the runs that are there."""
    about, rows = LONG[study], read_rows(TABLES / f"{study}.csv")
    parts = [f"## {about.title}", remarks.strip(), describe(rows, f"python benchmarks/results.py --only {study}")]
    for data, student in about.settings:
        place = f"{study}_{data}_{student}.png"
        own = [row for row in rows if (row["data"], row["student"]) == (data, student)]
        tables = tabulate(own, together=about.together)
        if not tables:
            continue
        parts.append(f"### {about.names[data]}, {about.names[student]}")
        for row in rows:
            if (row["data"], row["student"]) == (data, "teacher"):
                parts.append(f"The teacher: recall@1 {float(row[R1]):.3f}, MAP@R {float(row['map_at_r']):.3f}.")
        for caption, lines in tables.items():
            parts += [f"**{caption}**", table(*to_cells(lines, about.seeds))]
        if any(R1 in line.gains for lines in tables.values() for line in lines):
            write_whole(TABLES / place, to_png(draw(tables)))
            parts.append(f"![Gains in recall@1](results/{place})")
    return [*parts, f"Single runs: [results/{study}.csv](results/{study}.csv)"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page() -> str:
    """All of it."""
    present = {study: runs(study) for study in STUDIES if (TABLES / f"{study}.csv").exists()}
    texts = dict(re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- |\Z)", (HERE / "remarks.md").read_text(), flags=re.DOTALL))
    parts = ["# Results", texts["beginning"].strip()]
    for study in LONG:
        if (OUT / study / "runs.csv").exists():
            content = (OUT / study / "runs.csv").read_bytes()
            write_whole(TABLES / f"{study}.csv", content[: content.rfind(b"\n") + 1])  # a run may be writing
        if (TABLES / f"{study}.csv").exists():
            parts += long_section(study, texts[study])
    known = present | {study: long_runs(study) for study in LONG}
    claims = [row for claim in CLAIMS for row in checked(claim, known)]
    head = ["claim", "setting", "difference of", "score", "seeds", "mean [95 % interval]", "here"]
    parts += ["## The claims, one by one", texts["claims"].strip(), table(head, claims), texts["tried"].strip()]
    for study in present:
        text = (TABLES / f"{study}.md").read_text().strip()
        title, rest = text.split("\n", 1)
        parts += [f"#{title}", texts[study].strip(), rest.strip(), f"![{title[2:]}](results/{study}.png)"]
        parts.append(f"Single runs: [results/{study}.csv](results/{study}.csv)")
    parts += ["## MHGD", texts["mhgd"].strip(), "## What was published", texts["published"].strip()]
    parts.append(table(["loss", "published result"], published(present)))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Train what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (2)")
    every = (*LONG, *STUDIES)
    parser.add_argument("--only", nargs="*", choices=every, default=every, help="some of the studies")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="archives of the long studies")
    parser.add_argument("--page", action="store_true", help="write the page from the tables that are there")
    options = parser.parse_args()
    for study in () if options.page else options.only:
        if study in LONG:
            if (TABLES / f"{study}.csv").exists() and not (OUT / study / "runs.csv").exists():
                (OUT / study).mkdir(parents=True)
                shutil.copy(TABLES / f"{study}.csv", OUT / study / "runs.csv")
            run_study(LONG[study](options.data, OUT / "teachers"), OUT / study, options.jobs)
        else:
            train(study, options.jobs)
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
