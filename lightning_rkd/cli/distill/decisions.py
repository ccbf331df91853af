"""Measurements and decisions of a distillation, kept so that a resumed one decides the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_rkd.utils.files import write_whole

FILE = "state.json"


def decide(folder: Path, name: str, compute: Callable[[], Any]) -> Any:
    """Value of a name in the file of decisions; it is computed and written if it is not there."""
    path = folder / FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in known:
        known[name] = compute()
        write_whole(path, json.dumps(known, indent=1).encode())
    return known[name]
