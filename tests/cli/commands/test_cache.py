"""The command that caches a teacher: resumed, repeated, refused, and read by a recipe."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rkd.cli import main as cli
from lightning_rkd.distillation.teachers import cache_format
from lightning_rkd.models import ConvNet
from tests.harness.processes import GLYPHS, end_of, start

TINY = [*GLYPHS, "--data.batches_per_epoch=2"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    save_teacher()
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_teacher(seed: int = 0) -> None:
    torch.manual_seed(seed)
    Path("runs/glyphs_teacher").mkdir(parents=True, exist_ok=True)
    teacher = ConvNet(widths=[24, 48, 96], embedding_dim=128, normalize=True)
    torch.save(teacher.state_dict(), "runs/glyphs_teacher/last.ckpt")


def cache(*more: str, out: str = "kept") -> list[str]:
    return ["cache", "--config", "glyphs_rkd", "--out", out, "--shard_rows", "64", "--batch_size", "32", *TINY, *more]


def files(folder: str = "kept") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def recipe(path: str = "kept", *more: str) -> list[str]:
    Path("cached.json").write_text(json.dumps({"model": {"init_args": {"teacher": {
        "class_path": "CachedTeacher", "init_args": {"path": path}}}}}))  # fmt: skip
    keep = ["--config", "glyphs_rkd", "--config", "cached.json", "--trainer.default_root_dir=run"]
    return ["fit", *keep, *TINY, "--trainer.max_epochs=1", *more]


def test_it_writes_once_and_says_so_when_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(cache()) == 0
    assert "written: kept" in capsys.readouterr().out
    before = files()
    assert "manifest.json" in before
    assert len(before) > 3
    assert cli.main(cache()) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert files() == before


def test_what_is_sound_is_kept_and_what_is_not_is_written_again() -> None:
    assert cli.main(cache()) == 0
    whole = files()
    old = Path("kept", cache_format.shard_name(0)).stat().st_mtime_ns
    Path("kept", cache_format.shard_name(1)).write_bytes(whole[cache_format.shard_name(1)][:-5])
    damaged = bytearray(whole[cache_format.shard_name(2)])
    damaged[-1] ^= 1
    Path("kept", cache_format.shard_name(2)).write_bytes(damaged)
    assert cli.main(cache()) == 0
    assert files() == whole
    assert Path("kept", cache_format.shard_name(0)).stat().st_mtime_ns == old
    Path("kept", "manifest.json").write_text("{")
    assert cli.main(cache()) == 0
    assert files() == whole


def test_another_teacher_or_another_data_set_begins_anew_only_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(cache()) == 0
    before = files()
    save_teacher(seed=1)
    assert cli.main(cache()) == 1
    message = capsys.readouterr().err
    assert "teacher weights: cached" in message
    assert "--overwrite" in message
    assert "data" not in message.split("something else:")[1].split("Use it")[0]
    Path("kept", "manifest.json").unlink()  # and so it is of one that was never finished
    assert cli.main(cache()) == 1
    assert "teacher weights: cached" in capsys.readouterr().err
    Path("kept", "manifest.json").write_bytes(before["manifest.json"])
    save_teacher(seed=0)
    assert cli.main(cache("--data.max_classes=21")) == 1
    assert "data length: cached" in capsys.readouterr().err
    assert files() == before
    save_teacher(seed=1)
    assert cli.main(cache("--overwrite")) == 0
    assert files() != before


def test_a_recipe_trains_with_the_cache_and_never_opens_the_teachers_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(cache()) == 0
    Path("runs/glyphs_teacher/last.ckpt").unlink()
    assert cli.main(recipe()) == 0
    assert cli.main(recipe("kept", "--data.max_classes=21")) == 1
    assert "data length: cached" in capsys.readouterr().err
    assert cli.main(recipe("nowhere")) == 1
    assert "lightning-rkd cache --config RECIPE --out nowhere" in capsys.readouterr().err


def test_views_are_those_that_training_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(cache("--data.views=2")) == 0
    assert cache_format.CacheReader(Path("kept"), {}).plan["views"] == 2
    assert cli.main(recipe("kept", "--data.views=2")) == 0
    assert cli.main(recipe()) == 1
    assert "data augmentation: cached" in capsys.readouterr().err


def test_without_a_recipe_or_a_teacher_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache"]) == 2
    assert "--config RECIPE" in capsys.readouterr().err
    assert cli.main(["cache", "--config", "glyphs_teacher", *TINY]) == 2
    assert "one teacher to cache, and it has 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_given_again_it_leaves_the_same_files(sent: signal.Signals) -> None:
    assert cli.main(cache(out="whole")) == 0
    process = start(*cache("--shard_rows", "8"))
    expected_first = Path("kept", cache_format.shard_name(random.Random(0).randrange(2, 10)))
    while not expected_first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(sent)
    code, output = end_of(process)
    assert code == (143 if sent == signal.SIGTERM else -9), output
    assert not Path("kept", "manifest.json").exists()
    assert cli.main(cache("--shard_rows", "8")) == 0
    assert cli.main(cache("--shard_rows", "8", out="unbroken")) == 0
    assert files() == files("unbroken")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    Path("command.py").write_text("import sys; from lightning_rkd.cli.main import main; sys.exit(main())")
    assert cli.main(cache(out="one")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = [*launcher, "command.py", *cache(out="two")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert files("two") == files("one")


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    written, original = [], cache_format.write_whole

    def full(path: Any, content: Any) -> None:
        if len(written) == 2:
            raise OSError(f"{str(path)!r} could not be written, and is what it was before: No space left on device")
        written.append(path)
        original(path, content)

    monkeypatch.setattr(cache_format, "write_whole", full)
    assert cli.main(cache()) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(files()) == 2
    monkeypatch.setattr(cache_format, "write_whole", original)
    assert cli.main(cache()) == 0
    assert cli.main(cache(out="whole")) == 0
    assert files() == files("whole")
