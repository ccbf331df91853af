"""Every test of the command line has a folder of its own and no setting of the user's."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rkd.cli.main import TRACEBACK
from tests.harness.platforms import LOOPBACK


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(TRACEBACK, raising=False)
    cache = str(tmp_path.parent / "cache")  # glyphs are rendered once
    settings = {"XDG_CACHE_HOME": cache, "COLUMNS": "120", **LOOPBACK}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning turns it off after Ctrl-C
