"""Where results come from: the machine, and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def hardware(device: str) -> str:
    """The GPU's name (``"cuda"``), or the processor's and the number of its cores.

    Example:
        >>> hardware("cpu").endswith(" cores")
        True
    """
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit(folder: Path) -> str:
    """The commit of the git checkout that a folder's files belong to, with a + where files differ from it; else ``""``.

    Example:
        >>> commit(Path("no such folder"))
        ''
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files"):  # in a checkout of something else, such as an environment in a project's folder
            return ""
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
