"""Files are written atomically, and damage is found before anything is read."""

import errno
import io
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.utils.files import check_file, write_whole
from tests.harness.platforms import posix_only


def content() -> bytes:
    file = io.BytesIO()
    torch.manual_seed(0)
    torch.save({"epoch": 3, "state_dict": nn.Linear(5, 3).state_dict()}, file)
    return file.getvalue()


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def outcome(path: Path, sound: object) -> str:
    """Result of verifying a file and loading it."""
    try:
        check_file(path)
        found = torch.load(path, weights_only=True)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        return "refused"
    return "harmless" if same(found, sound) else "silent"


def test_no_flipped_bit_changes_what_is_loaded(tmp_path: Path) -> None:
    """Every fourth byte of a whole file, header and directory included; padding is harmless."""
    sound, path, rng = content(), tmp_path / "x.ckpt", random.Random(0)
    expected = torch.load(io.BytesIO(sound), weights_only=True)
    outcomes = {"refused": 0, "harmless": 0, "silent": 0}
    for at in range(rng.randrange(4), len(sound), 4):
        flipped = bytearray(sound)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        outcomes[outcome(path, expected)] += 1
    assert outcomes["silent"] == 0
    assert outcomes["refused"] > 100


def test_a_tensor_that_has_become_a_folder_is_damaged(tmp_path: Path) -> None:
    """This one bit of the zip directory makes torch.load leave a tensor uninitialised."""
    sound, path = bytearray(content()), tmp_path / "x.ckpt"
    entry = sound.rindex(b"archive/data/0") - 46
    assert sound[entry : entry + 4] == b"PK\1\2"
    sound[entry + 38] ^= 0x10
    path.write_bytes(sound)
    with pytest.raises(ValueError, match=r"x\.ckpt' is damaged in 'archive/data/0'; use an earlier one"):
        check_file(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    sound, path = content(), tmp_path / "x.ckpt"
    for length in range(0, len(sound), 7):
        path.write_bytes(sound[:length])
        assert outcome(path, None) == "refused"


@posix_only
def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path) -> None:
    """SIGKILL when all bytes are written and the name is not changed yet."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = "import os, sys; from lightning_rkd.utils import files; os.fsync = lambda f: os.kill(os.getpid(), 9)"
    run = [sys.executable, "-c", f"{code}; files.write_whole(sys.argv[1], b'new' * 1000)", str(path)]
    assert subprocess.run(run).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"new"}, "no temporary file is left"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt("stop"), "stop"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "x' could not be written, .* was before: No space left on"),
    ],
)
def test_a_failed_write_keeps_the_old_content_and_cleans_up(
    error: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=message):
        write_whole(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}
