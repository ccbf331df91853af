"""Kills, damage, full disks and dying ranks: what is lost, what hangs, what goes on in silence.

Run ``python benchmarks/faults.py``; it writes ``docs/faults.md``. ``--kills 4 --ranks 0`` for a shorter run.

A kill is SIGTERM or SIGKILL, by turns, to a process that runs the real command line on miniature data, at a moment
drawn from its whole life: while it starts, in the middle of an epoch, while a checkpoint is being written, during
evaluation, or anywhere. Then the command is given again, and everything that the two leave is compared, bit for bit,
with what an unbroken run leaves. Processes are forked from this one, which has imported everything, so that a kill
costs seconds.
"""

from __future__ import annotations

import argparse
import collections
import csv
import datetime
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_rkd.cli.commands import demo
from lightning_rkd.cli.experiments import runs
from lightning_rkd.cli.main import main as command
from lightning_rkd.cli.trainer import check_checkpoint
from lightning_rkd.distillation.teachers import load_weights
from lightning_rkd.models import ConvNet
from lightning_rkd.utils import files

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
LIMIT = 600.0  # seconds after which a process that has not ended counts as hanging
PHASES = ("start", "epoch", "write", "evaluation", "any")
EPOCHS, STEPS = 4, 6

FIT = [
    f"--data.batches_per_epoch={STEPS}", f"--trainer.max_epochs={EPOCHS}", "--data.max_classes=20",
    "--data.image_size=12", "--data.classes_per_batch=4", "--data.eval_batch_size=16", "--trainer.accelerator=cpu",
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
KEEP = {
    "every epoch": [],
    "best and last": ["--checkpoint.monitor=val/recall_at_1", "--checkpoint.mode=max"],
    "every 4 steps": ["--checkpoint.every_n_train_steps=4"],
}
DEMO = ["demo", "--data", "photos", "--steps", "100", "--seeds", "1", "--out"]


def distil(folder: str, keep: str) -> list[str]:
    """The command that trains a student from the teacher in ``teacher/last.ckpt``."""
    weights = {"model": {"init_args": {"teacher": {"init_args": {"weights": "teacher/last.ckpt"}}}}}
    Path("weights.yaml").write_text(json.dumps(weights))
    chosen = ["--config=weights.yaml", *KEEP[keep], f"--trainer.default_root_dir={folder}"]
    return ["fit", "--config", "glyphs_rkd", *FIT, *chosen]


# Processes


@dataclass
class Moment:
    """When a process shall be killed: so many seconds after the n-th time that something begins."""

    phase: str
    number: int
    delay: float
    sent: signal.Signals

    def arm(self) -> None:
        """Called in the process itself; the signal comes from a thread, at whatever the main one is doing."""
        if self.phase in ("start", "any"):
            self.fire()
        elif self.phase == "write":
            self.after(files, "write_whole")
        elif self.phase == "epoch":
            self.after(pl.LightningModule, "optimizer_step")
        else:
            self.after(pl.LightningModule, "on_validation_model_eval")

    def after(self, owner: Any, name: str) -> None:
        original, calls = getattr(owner, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.number:
                self.fire()
            return original(*args, **kwargs)

        ours = [m for n, m in list(sys.modules.items()) if n.startswith("lightning_rkd.")]
        for place in (owner, *(m for m in ours if m.__dict__.get(name) is original)):
            setattr(place, name, counted)

    def fire(self) -> None:
        threading.Thread(target=self.send, daemon=True).start()

    def send(self) -> None:
        time.sleep(self.delay)
        os.kill(os.getpid(), self.sent)


def run(args: Sequence[str], log: Path, moment: Moment | None = None) -> tuple[int | None, float]:
    """Run a command in a process of its own: exit code (negative a signal, ``None`` if it hung), and seconds."""
    start, pid = time.monotonic(), os.fork()
    if pid == 0:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            if moment is not None:
                moment.arm()
            code = command(args)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(code)
    while time.monotonic() - start < LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, LIMIT


# What is left


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints or results are equal, bit for bit; paths, clocks and the record of their making apart."""
    if isinstance(a, dict) and isinstance(b, dict):
        skip = {"callbacks", "run", "hyper_parameters", "datamodule_hyper_parameters", "seconds"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in skip)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def weights_and_state(path: Path) -> Any:
    state = torch.load(path, weights_only=True)
    return {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}


def untimed(path: Path) -> list[list[str]]:
    """The rows of a table, in CSV or among the lines of a page, without the columns that hold seconds."""
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines())) if path.suffix == ".csv" else [s.split("|") for s in text.splitlines()]
    timed: set[int] = set()
    for row in rows:
        if found := {at for at, cell in enumerate(row) if cell.strip() in ("seconds", "seconds_spread")}:
            timed = found
    return [[cell for at, cell in enumerate(row) if at not in timed or len(row) <= max(timed)] for row in rows]


def differences(whole: Path, resumed: Path) -> list[str]:
    """The files in which a resumed run differs from an unbroken one."""
    names = {p.relative_to(f) for f in (whole, resumed) for p in f.rglob("*") if p.is_file() and p.name != "log.txt"}
    found = []
    for name in sorted(names):
        pair = whole / name, resumed / name
        if not all(p.exists() for p in pair):
            equal = False
        elif name.suffix == ".ckpt":
            equal = same(*map(weights_and_state, pair))
        elif name.suffix == ".pt":
            equal = same(*(torch.load(path, weights_only=True) for path in pair))
        elif name.suffix in (".csv", ".md"):
            equal = untimed(pair[0]) == untimed(pair[1])
        else:  # configurations name their folder
            equal = name.suffix == ".yaml" or pair[0].read_bytes() == pair[1].read_bytes()
        found += [] if equal else [str(name)]
    return found


def broken(folder: Path) -> list[str]:
    """Checkpoints and results in a folder that cannot be read."""
    found = []
    for path in (*folder.rglob("*.ckpt"), *folder.rglob("*.pt")):
        try:
            check_checkpoint(path)
        except ValueError:
            found.append(str(path.relative_to(folder)))
    return found


def kept_steps(folder: Path) -> str:
    """The step of the last checkpoint, for the table; of a demo, how many networks it has finished."""
    if (folder / demo.MADE_BY).exists():
        return f"{len(list(folder.rglob(runs.RESULT)))} networks"
    path = folder / "last.ckpt"
    return f"step {torch.load(path, weights_only=True)['global_step']}" if path.exists() else "nothing yet"


# The campaign


@dataclass
class Kill:
    """One kill and what came of it."""

    what: str
    phase: str
    sent: str
    code: int | None
    kept: str
    resumed: int | None
    broken: list[str]
    different: list[str]

    @property
    def verdict(self) -> str:
        if self.code is None or self.resumed is None:
            return "HANGS"
        if self.resumed != 0 or self.broken or self.different:
            return f"LOST {' '.join((*self.broken, *self.different))}"
        return "same" if self.code in (-signal.SIGKILL, -signal.SIGTERM, 143) else f"WRONG CODE {self.code}"


def kill(
    rng: random.Random, phase: str, sent: signal.Signals, args: Callable[[str], list[str]], name: str, lasts: float
) -> tuple[int | None, Path]:
    """Kill a command; when it was faster than the signal, draw again."""
    for attempt in range(20):
        folder = Path(f"{name}-{attempt}")
        counts = {"epoch": EPOCHS * STEPS, "write": EPOCHS, "evaluation": EPOCHS}
        if args("")[0] == "demo":  # trains in a process of its own; this one writes the settings and six files
            phase, counts = (phase if phase in ("start", "write") else "any"), {"write": 7}
        calls = counts.get(phase, 1)
        spread = {"start": min(2.0, lasts / 4), "epoch": 0.05, "write": 0.005, "evaluation": 0.05, "any": lasts}[phase]
        moment = Moment(phase, rng.randint(1, calls), rng.uniform(0, spread), sent)
        code, _ = run(args(str(folder)), Path(f"{folder}.log"), moment)
        if code != 0:
            return code, folder
    raise RuntimeError(f"{name}: the process was always faster")


def campaign(kills: int, rng: random.Random, say: Callable[[str], None]) -> list[Kill]:
    """Half of the kills hit training, half the demo."""
    code, _ = run(
        ["fit", "--config", "glyphs_teacher", *FIT, "--trainer.default_root_dir=teacher"], Path("teacher.log")
    )
    assert code == 0, Path("teacher.log").read_text()
    whole: dict[str, float] = {}
    for keep in KEEP:
        code, whole[keep] = run(distil(f"whole {keep}", keep), Path("whole.log"))
        assert code == 0, Path("whole.log").read_text()
    code, whole["demo"] = run([*DEMO, "whole demo"], Path("demo.log"))
    assert code == 0, Path("demo.log").read_text()
    say(f"unbroken runs: {', '.join(f'{k} {v:.0f} s' for k, v in whole.items())}")
    found = []
    for number in range(kills):
        what = "demo" if number % 2 else list(KEEP)[number // 2 % len(KEEP)]
        phase = PHASES[number // 2 % len(PHASES)]
        sent = (signal.SIGTERM, signal.SIGKILL)[(number // 2 + number) % 2]

        def args(folder: str, what: str = what) -> list[str]:
            return [*DEMO, folder] if what == "demo" else distil(folder, what)

        code, folder = kill(rng, phase, sent, args, f"kill-{number}", whole[what])
        bad, kept = broken(folder), kept_steps(folder)
        again = args(str(folder)) if what == "demo" else [*args(str(folder)), "--ckpt_path=last"]
        resumed, _ = run(again, Path(f"{folder}.log"))
        different = differences(Path(f"whole {what}"), folder) if resumed == 0 else []
        found.append(Kill(what, phase, sent.name, code, kept, resumed, bad, different))
        say(f"{number + 1}/{kills} {what}, {phase}, {sent.name}: exit {code}, kept {kept}: {found[-1].verdict}")
    return found


def damage(flips: int, cuts: int, rng: random.Random) -> dict[str, collections.Counter[str]]:
    """Flip bits and cut ends of a checkpoint; resume from it, and take it for a teacher's weights."""
    source = Path("teacher/last.ckpt")
    sound, path = source.read_bytes(), Path("damaged.ckpt")
    with zipfile.ZipFile(source) as archive:
        directory, entries = archive.start_dir, archive.infolist()
    whole = torch.load(source, weights_only=True)
    network = ConvNet(widths=(24, 48, 96), embedding_dim=128, normalize=True)
    load_weights(network, source)
    weights = {key: x.clone() for key, x in network.state_dict().items()}

    def resume() -> bool:
        check_checkpoint(path)
        return same(torch.load(path, weights_only=True), whole)

    def teach() -> bool:
        load_weights(network, path)
        return same(network.state_dict(), weights)

    places = {
        "anywhere": lambda: rng.randrange(len(sound)),
        "entry headers": lambda: rng.choice(entries).header_offset + rng.randrange(64),
        "zip directory": lambda: rng.randrange(directory, len(sound)),
    }
    counts: dict[str, collections.Counter[str]] = {}
    for number in range(flips + cuts):
        place = [*places][number % len(places)] if number < flips else "cut short"
        content = bytearray(sound)
        if number < flips:
            content[places[place]()] ^= 1 << rng.randrange(8)
        else:
            content = content[: rng.randrange(len(sound))]
        path.write_bytes(content)
        for use, attempt in (("resuming", resume), ("teacher", teach)):
            try:
                outcome = "harmless" if attempt() else "silent"
            except ValueError:
                outcome = "refused"
            counts.setdefault(f"{place}, {use}", collections.Counter())[outcome] += 1
    return counts


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str]:
    """A folder in which only so many bytes fit: a small file system, or else a limit on files."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(options, capture_output=True).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        yield "tmpfs" if mounted else "RLIMIT_FSIZE"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk() -> list[str]:
    """Training on a disk that holds one checkpoint but not a second; then on one that is large enough."""
    size = Path("whole every epoch/last.ckpt").stat().st_size
    with small_disk(Path("small"), size * 3 // 2 // 4096 * 4096 + 16384) as how:
        code, _ = run(distil("small/run", "every epoch"), Path("small.log"))
        error = next((s for s in Path("small.log").read_text().splitlines() if s.startswith("error: ")), "no message")
        kept, bad = kept_steps(Path("small/run")), broken(Path("small/run"))
        shutil.copytree("small/run", "larger")
    resumed, _ = run([*distil("larger", "every epoch"), "--ckpt_path=last"], Path("larger.log"))
    different = differences(Path("whole every epoch"), Path("larger")) if resumed == 0 else ["no end"]
    verdict = "LOST" if bad or different or code in (0, None) else "same"
    return [how, str(code), error.replace(os.getcwd(), ""), kept, verdict]


# Ranks


class Fails(pl.Callback):
    """Spoils the inputs of one rank, or ends it, or stops the run, in the third epoch."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank = how, rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != 2 * STEPS + 3:
            return
        Path("failed").write_text(str(time.time()))
        if self.how == "NaN inputs":
            batch[0].fill_(torch.nan)
        elif self.how == "exception":
            raise RuntimeError("one rank fails")
        else:
            threading.Timer(0.05, os.kill, (os.getpid(), getattr(signal, self.how))).start()


def session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def ranks_run(folder: str, *more: str, early: bool = False) -> tuple[int | None, float]:
    """Train on two processes: exit code, and seconds from the failure to the end of the last process."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", *more]
    # a file: Lightning starts the second rank as the first one was started
    Path("command.py").write_text("import sys; from lightning_rkd.cli.main import main; sys.exit(main())")
    Path("failed").unlink(missing_ok=True)
    with Path(f"{folder}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "command.py", *distil(folder, "every epoch"), *two],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and (process.poll() is None or session(process.pid)):
        if early and len(session(process.pid)) > 1:
            early = False
            Path("failed").write_text(str(time.time()))
            process.kill()
        time.sleep(0.05)
    code = process.returncode if not session(process.pid) else None
    for pid in session(process.pid):
        os.kill(pid, signal.SIGKILL)
    failed = Path("failed")
    return code, time.time() - float(failed.read_text()) if failed.exists() else 0.0


def dying_ranks(number: int, say: Callable[[str], None]) -> Iterator[list[str]]:
    """One of two ranks fails; then the run is resumed, and compared with an unbroken one."""
    ways = [("SIGKILL", 1), ("SIGKILL", 0), ("SIGTERM", 0), ("NaN inputs", 1), ("exception", 1), ("SIGKILL early", 0)]
    if number:
        code, _ = ranks_run("whole ranks")
        assert code == 0, Path("whole ranks.log").read_text()
    for how, rank in ways[:number]:
        folder, early = f"{how} {rank}", how.endswith("early")
        failing = json.dumps({"class_path": "benchmarks.faults.Fails", "init_args": {"how": how, "rank": rank}})
        code, seconds = ranks_run(folder, *([] if early else [f"--trainer.callbacks+={failing}"]), early=early)
        Path(folder).mkdir(exist_ok=True)
        bad, kept = broken(Path(folder)), kept_steps(Path(folder))
        resumed, _ = ranks_run(folder, "--ckpt_path=last")
        different = differences(Path("whole ranks"), Path(folder)) if resumed == 0 else ["no end"]
        verdict = "HANGS" if code is None else "LOST" if bad or different or code == 0 else "same"
        named = how.replace(" early", " before the ranks have joined")
        row = [named, str(rank), str(code), f"{seconds:.0f}", kept, verdict]
        say(f"ranks: {', '.join(row)}")
        yield row


# The page


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def page(
    kills: list[Kill], counts: dict[str, collections.Counter[str]], disk: list[str], ranks: list[list[str]], call: str
) -> str:
    sent = [[str(n), k.what, k.phase, k.sent, str(k.code), k.kept, k.verdict] for n, k in enumerate(kills, start=1)]
    hung = sum(k.verdict == "HANGS" for k in kills) + sum(row[-1] == "HANGS" for row in ranks)
    lost = sum(k.verdict not in ("HANGS", "same") for k in kills) + sum(r[-1] == "LOST" for r in (disk, *ranks))
    silent = sum(count["silent"] for count in counts.values())
    outcomes = ("refused", "harmless", "silent")
    lines = [
        "# Faults",
        "",
        f"Written by `{call}` on {datetime.date.today()}; {platform.machine()}, {os.cpu_count()} cores shared with "
        f"other work, one thread a process, PyTorch {torch.__version__}, Lightning {pl.__version__}.",
        "",
        f"**{len(kills)} kills: {lost} runs lost, {hung} hung; {silent} damaged files read in silence.**",
        "",
        "## Kills",
        "",
        f"SIGTERM and SIGKILL by turns to `lightning-rkd fit` (a student with a teacher, {EPOCHS} epochs of {STEPS} "
        "steps; three ways of keeping checkpoints) and to `lightning-rkd demo` (three networks of two epochs). *When* "
        "is where the moment was drawn from: the start, some step, the write of a file, evaluation, or the whole run. "
        "*Exit* is the code of the process, negative for a signal that ended it (SIGKILL, and SIGTERM while no Python "
        "looked out for it). Then the command was given again (`fit` with `--ckpt_path last`). *Same* says that "
        "weights, optimizer, scheduler, counters and scores came out as in the unbroken run, bit for bit, and that no "
        "file was broken or left over.",
        "",
        *table(("", "checkpoints", "when", "signal", "exit", "kept", "outcome"), sent),
        "",
        "## Damage",
        "",
        "One bit of a checkpoint flipped, or its end cut off, at a random place; then `--ckpt_path` and "
        "`Teacher(weights=...)` read it. *Harmless*: padding, or a field that nobody reads; all that is loaded is as "
        "it was.",
        "",
        *table(("where", *outcomes), [[k, *(str(c[o]) for o in outcomes)] for k, c in counts.items()]),
        "",
        "## A full disk",
        "",
        "The disk holds one checkpoint but not a second beside it; then the run continues on a larger one.",
        "",
        *table(("how", "exit", "message", "kept", "outcome"), [disk]),
    ]
    if ranks:
        lines += [
            "",
            "## Ranks",
            "",
            "Two processes (DDP, gloo), one of which fails in the third epoch. *Seconds* until no process is left; "
            "Lightning looks for dead ranks every five. *Same* is meant as above, after resuming on two processes.",
            "",
            *table(("what happens", "to rank", "exit", "seconds", "kept", "outcome"), ranks),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=6, help="how many of the six failures of a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    args = parser.parse_args()
    call = f"python benchmarks/faults.py --kills {args.kills} --ranks {args.ranks} --seed {args.seed}"
    out, rng, start = args.out.resolve(), random.Random(args.seed), time.monotonic()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        pixels = np.random.default_rng(0)
        for c in range(8):
            Path("photos", str(c)).mkdir(parents=True)
            for i in range(4):
                image = np.clip(pixels.normal(30 * c, 60, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(Path("photos", str(c), f"{i}.png"))
        kills = campaign(args.kills, rng, say)
        counts = damage(200, 50, rng)
        say(f"damage: {sum(counts.values(), collections.Counter())}")
        disk = full_disk()
        say(f"full disk: {', '.join(disk)}")
        ranks: list[list[str]] = []
        out.write_text(page(kills, counts, disk, ranks, call), encoding="utf-8")
        for row in dying_ranks(args.ranks, say):
            ranks.append(row)
            out.write_text(page(kills, counts, disk, ranks, call), encoding="utf-8")
        os.chdir("/")
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
