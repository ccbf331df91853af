"""Growth of memory per rank of metrics on 1, 2 and 4 ranks: docs/metrics_across_devices.md.

    python benchmarks/retrieval_ranks.py [--rows 30000] [--ranks 1 2 4] [--metrics ...] [--out FILE]

Every figure comes from fresh processes with one thread each. Memory is how far the resident set grew, at its peak, from
before the rank had any row until ``compute()`` had returned: the most of all ranks. The rows are made rank by rank, so
that no rank ever saw the others'. "all rows everywhere" is the same evaluation on as many ranks that first gather all
rows on each, as torchmetrics synchronises a state by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_rkd.metrics import EmbeddingRetrieval, RelationalAgreement
from lightning_rkd.utils.distributed import gather_rows

WIDTH, PER_CLASS, PIECE = 128, 10, 500
METRICS = ("EmbeddingRetrieval", "RelationalAgreement")


def rows(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher, student and labels of rows by number, the same on every rank."""
    pieces: dict[int, tuple[Tensor, Tensor]] = {}
    teacher, student = torch.empty(len(numbers), WIDTH), torch.empty(len(numbers), WIDTH)
    for place, number in enumerate(numbers.tolist()):
        if number // PIECE not in pieces:
            generator = torch.Generator().manual_seed(number // PIECE)
            centres = torch.randn(PIECE // PER_CLASS, WIDTH, generator=generator).repeat_interleave(PER_CLASS, 0)
            x = centres + 2 * torch.randn(PIECE, WIDTH, generator=generator)
            pieces = {number // PIECE: (x, x + torch.randn(PIECE, WIDTH, generator=generator))}
        x, y = pieces[number // PIECE]
        teacher[place], student[place] = x[number % PIECE], y[number % PIECE]
    return teacher, student, numbers // PER_CLASS


def evaluate(name: str, numbers: Tensor, everywhere: bool) -> dict[str, float]:
    metric = EmbeddingRetrieval() if name == METRICS[0] else RelationalAgreement(max_anchors=500)
    for part in torch.split(numbers, PIECE):
        teacher, student, labels = rows(part)
        metric.update(student, labels if name == METRICS[0] else teacher, part)
    if everywhere:
        for state in (*metric._floats, *metric._integers):
            if held := getattr(metric, state):
                setattr(metric, state, [gather_rows(torch.cat(held))])
    return {key: float(value) for key, value in metric.compute().items()}


def status(line: str) -> float:
    """A line of this process's status, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{line}:")[1].split()[0]) / 1024


def measure(name: str, total: int, everywhere: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    evaluate(name, torch.arange(rank, 600, size), everywhere)  # libraries loaded, code paths warm
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    values = evaluate(name, torch.arange(rank, total, size), everywhere)
    print(json.dumps({"MiB": status("VmHWM") - before, "values": values}), flush=True)
    torch.distributed.destroy_process_group()


def on_ranks(name: str, total: int, size: int, everywhere: bool) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        __file__,
        "--measure",
        name,
        "--rows",
        str(total),
        *(["--everywhere"] if everywhere else []),
    ]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    world |= {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    found = []
    for process in ranks:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a rank ended with exit code {process.returncode}")
        found.append(json.loads(said))
    return found


def table(metrics: list[str], total: int, sizes: list[int]) -> list[str]:
    lines = ["| metric | ranks | rows that a rank holds, MiB | peak growth of a rank, MiB |", "|---|---:|---:|---:|"]
    same = []
    for name in metrics:
        values = []
        held = total * WIDTH * 4 / 2**20 * (1 if name == METRICS[0] else 2)
        for size in sizes:
            for everywhere in (False, True) if size == max(sizes) > 1 else (False,):
                found = on_ranks(name, total, size, everywhere)
                values += [rank["values"] for rank in found]
                peak = max(rank["MiB"] for rank in found)
                what = f"{size}, all rows everywhere" if everywhere else f"{size}"
                mine = held if everywhere else held / size
                lines.append(f"| `{name}` | {what} | {mine:.1f} | {peak:.0f} |")
                print(lines[-1], file=sys.stderr, flush=True)
        assert all(found == values[0] for found in values), values
        same.append(", ".join(f"{key} {value!r}" for key, value in values[0].items()))
    return [*lines, "", "Every rank of every run gave the same values:", "", *(f"- {found}" for found in same)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--metrics", choices=METRICS, nargs="+", default=METRICS)
    parser.add_argument("--out", type=Path, help="page in which the table replaces the one there is")
    parser.add_argument("--measure", choices=METRICS, help=argparse.SUPPRESS)
    parser.add_argument("--everywhere", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.rows, options.everywhere)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no accelerator, PyTorch {torch.__version__}"
    text = [
        f"Measured by `python benchmarks/retrieval_ranks.py` on {date.today()}; {machine}, one thread per rank, gloo."
    ]
    text += [f"{options.rows:,} rows of width {WIDTH} in total, {PER_CLASS} a class, float32.", ""]
    text += table(options.metrics, options.rows, options.ranks)
    print("\n".join(text))
    if options.out:
        mark = "<!-- measured -->"
        head, _, tail = options.out.read_text().partition(mark)
        _, _, tail = tail.partition(mark)
        options.out.write_text("\n".join([f"{head}{mark}", *text, f"{mark}{tail}"]))


if __name__ == "__main__":
    main()
