"""The tables on speed, all of them, by one command: ``python benchmarks/speed.py --out docs/speed``.

Runs the scripts named below one after the other on the same machine, which should have nothing else to do; with
``--device cuda`` those that have something to say about a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ON_CPU = ["rkd_angle", "step", "cached_teacher", "micro_batches", "throughput", "retrieval"]
ON_GPU = ["rkd_angle", "step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", metavar="SCRIPT", help=f"some of {', '.join(ON_CPU)}")
    parser.add_argument("--out", type=Path, help="folder for a Markdown file of each")
    args = parser.parse_args()
    names = ON_GPU if args.device == "cuda" else ON_CPU
    for name in args.only or names:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
        if args.device == "cuda":
            command += ["--device", "cuda"]
        if args.out is not None:
            suffix = "_gpu" if args.device == "cuda" else ""
            command += ["--out", str(args.out / f"{name}{suffix}.md")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
