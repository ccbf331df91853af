"""Kills and damage of a teacher cache, the last section of ``docs/faults.md``.

Run ``python benchmarks/faults_cache.py``; it writes that section. SIGTERM and SIGKILL, by turns, are sent to the real
command while it writes (four of six) or at any moment; then the command is run again, and every file is compared, bit
for bit, with those of an uninterrupted run. A process that has not ended after ten minutes counts as hanging.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightning_rkd.cli.main import main as command
from lightning_rkd.distillation.teachers import CachedTeacher, CacheError
from lightning_rkd.distillation.teachers.cache_format import MANIFEST, shard_name
from lightning_rkd.models import ConvNet
from lightning_rkd.utils.types import Batch

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
TITLE = "## Teacher cache"
LIMIT = 600.0
CACHE = [
    "cache", "--config", "glyphs_rkd", "--shard_rows", "8", "--batch_size", "4", "--data.max_classes=20",
    "--data.image_size=12", "--data.classes_per_batch=4", "--trainer.accelerator=cpu", "--out",
]  # fmt: skip


def forked(folder: str) -> int:
    """Run the command in a fork of this process, which has imported everything."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        torch.set_num_threads(1)
        code = command([*CACHE, folder])
    finally:
        os._exit(code)


def end_of(pid: int) -> int | None:
    """Exit code, negative for a signal; ``None`` after a timeout."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*") if not path.name.startswith(".")}


def kills(count: int, rng: random.Random) -> list[str]:
    begun = time.monotonic()
    assert end_of(forked("whole")) == 0
    life = time.monotonic() - begun
    whole, rows = contents("whole"), []
    for number in range(count):
        folder, sent = f"killed{number}", (signal.SIGKILL, signal.SIGTERM)[number % 2]
        pid = forked(folder)
        if number % 6 < 4:  # while it writes: when some file has appeared
            awaited, deadline = Path(folder, shard_name(rng.randrange(len(whole) - 2))), time.monotonic() + LIMIT
            while not awaited.exists() and time.monotonic() < deadline:
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, life))
        os.kill(pid, sent)
        code = end_of(pid)
        there = len(contents(folder)) if Path(folder).exists() else 0
        again = end_of(forked(folder))
        outcome = "hung" if None in (code, again) else "same" if contents(folder) == whole else "DIFFERENT"
        rows.append(f"| {number + 1} | {sent.name} | {code} | {there} of {len(whole)} | {outcome} |")
        print(rows[-1], flush=True)
    return rows


def damage(count: int, rng: random.Random) -> list[str]:
    everything = torch.arange(160)
    plain = rows_of(everything)
    rows = []
    for file in (shard_name(3), MANIFEST):
        path = Path("whole", file)
        good = path.read_bytes()
        for kind in ("one bit flipped", "cut short"):
            seen = {"refused": 0, "harmless": 0, "silent": 0}
            for _ in range(count):
                bad = bytearray(good)
                if kind == "cut short":
                    bad = bad[: rng.randrange(len(good))]
                else:
                    bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
                path.write_bytes(bad)
                try:
                    found = rows_of(everything)
                    seen["harmless" if torch.equal(found, plain) else "silent"] += 1
                except CacheError:
                    seen["refused"] += 1
            rows.append(f"| {file}, {kind} | {seen['refused']} | {seen['harmless']} | {seen['silent']} |")
            print(rows[-1], flush=True)
        path.write_bytes(good)
    return rows


def rows_of(rows: torch.Tensor) -> torch.Tensor:
    features = CachedTeacher("whole").outputs(Batch(None, indices=rows))[0].features[""].embedding
    assert features is not None
    return features


def full_disk(rng: random.Random) -> list[str]:
    """Run the command under a limit on the size of a file, which raises the error of a full disk."""
    if not (pid := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        sys.stderr = Path("said.txt").open("w")  # noqa: SIM115 - the process ends
        code = command([*CACHE, "full"])
        os._exit(code)
    code = end_of(pid)
    again = end_of(forked("full"))
    outcome = "same" if again == 0 and contents("full") == contents("whole") else "DIFFERENT"
    return [f"| no file above 2,000 bytes | {code} | {outcome} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--damage", type=int, default=50, help="of each file in each way")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, begun, home = random.Random(args.seed), time.monotonic(), os.getcwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("runs/glyphs_teacher").mkdir(parents=True)
        torch.manual_seed(0)
        teacher = ConvNet(widths=[24, 48, 96], embedding_dim=128, normalize=True)
        torch.save(teacher.state_dict(), "runs/glyphs_teacher/last.ckpt")
        killed, damaged, full = kills(args.kills, rng), damage(args.damage, rng), full_disk(rng)
        os.chdir(home)
    lines = [
        TITLE,
        "",
        f"`python benchmarks/faults_cache.py --seed {args.seed}`, {datetime.date.today()}, "
        f"{(time.monotonic() - begun) / 60:.0f} minutes. `lightning-rkd cache` is killed while it writes or at any "
        "moment, and run again; *kept* are the files that were complete by then.",
        "",
        "| kill | signal | exit | kept | outcome |",
        "| --- | --- | --- | --- | --- |",
        *killed,
        "",
        "Damage, then every row is read through `CachedTeacher`:",
        "",
        "| where | refused | harmless | silent |",
        "| --- | --- | --- | --- |",
        *damaged,
        "",
        "| disk full while writing | exit | outcome of the next run |",
        "| --- | --- | --- |",
        *full,
    ]
    before = PAGE.read_text().partition(TITLE)[0].rstrip()
    PAGE.write_text(before + "\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
