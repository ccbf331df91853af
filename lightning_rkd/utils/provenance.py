"""Provenance of results: the machine and the commit."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def hardware(device: str) -> str:
    """Name of the GPU (``"cuda"``), or of the processor with the number of its cores."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit(folder: Path) -> str:
    """Commit of the git checkout that tracks a folder's files, with a + if files are modified; otherwise ``""``."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files"):  # an environment inside the checkout of another project
            return ""
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
