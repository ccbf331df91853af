"""The tables on speed by one command, ``python benchmarks/speed.py --out docs/speed``, in 20 minutes on two idle cores.

Runs the scripts named below one after the other on the same machine, which should have nothing else to do; with
``--device cuda`` those that have something to say about a GPU. ``--dry`` takes tiny sizes, to see that they run.
Approximate search takes as long as all others together, and is left out: ``python benchmarks/retrieval.py --parts
approximate``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ON_CPU = {  # arguments, which keep each to some minutes
    "rkd_angle": [],
    "step": [],
    "cached_teacher": [],
    "micro_batches": [],
    "throughput": [],
    "retrieval": ["--parts", "exact", "growth", "million"],
}
ON_GPU: dict[str, list[str]] = {"rkd_angle": [], "step": ["--batch", "128"]}
TINY = {
    "rkd_angle": ["--sizes", "16", "--growth", "16", "32", "--widths", "8", "--large", "--seconds", "0.1"],
    "step": ["--batch", "2", "--pairs", "3", "--turns", "1"],
    "cached_teacher": ["--batches", "2", "--batch", "4", "--size", "32", "--repeats", "1"],
    "micro_batches": ["--rows", "8", "--micro-batch", "4", "--runs", "1"],
    "throughput": ["--turns", "2", "--steps", "1"],
    "retrieval": ["--parts", "exact", "--rows", "600", "--per-class", "5", "--repeats", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", metavar="SCRIPT", help=f"some of {', '.join(ON_CPU)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to see that the scripts run")
    parser.add_argument("--out", type=Path, help="folder for a Markdown file of each")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    scripts, begun = ON_GPU if args.device == "cuda" else ON_CPU, time.perf_counter()
    for name in args.only or scripts:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
        command += TINY[name] if args.dry else scripts.get(name, [])
        if args.device == "cuda":
            command += ["--device", "cuda"]
        if args.out is not None:
            suffix = "_gpu" if args.device == "cuda" else ""
            command += ["--out", str(args.out / f"{name}{suffix}.md")]
        subprocess.run(command, check=True)
        print(
            f"{name}: done after {(time.perf_counter() - begun) / 60:.1f} minutes of all", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    main()
