"""The command that caches a teacher: resumed, repeated, refused, and read by a recipe."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rkd.cli import main as cli
from lightning_rkd.distillation.teachers import cache_format
from lightning_rkd.distillation.teachers.cache_format import MANIFEST, shard_name
from lightning_rkd.models import ConvNet
from tests.harness.forks import run_code
from tests.harness.platforms import LOOPBACK, posix_only
from tests.harness.processes import GLYPHS, MAIN, end_of, start
from tests.harness.ranks import free_port

TINY = [*GLYPHS, "--data.batches_per_epoch=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher's weights and its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("finished"))
        save_teacher()
        assert cli.main(cache()) == 0
    return folder


@pytest.fixture(autouse=True)
def _teacher(_own_folder: None) -> None:
    save_teacher()


@pytest.fixture
def whole(finished: Path) -> dict[str, bytes]:
    """The files of a finished cache, in the folder ``kept``."""
    shutil.copytree(finished / "kept", "kept")
    return files()


def save_teacher(seed: int = 0) -> None:
    torch.manual_seed(seed)
    Path("runs/glyphs_teacher").mkdir(parents=True, exist_ok=True)
    teacher = ConvNet(widths=[24, 48, 96], embedding_dim=128, normalize=True)
    torch.save(teacher.state_dict(), "runs/glyphs_teacher/last.ckpt")


def cache(*more: str, out: str = "kept") -> list[str]:
    return ["cache", "--config", "glyphs_rkd", "--out", out, "--shard_rows", "64", "--batch_size", "32", *TINY, *more]


def files(folder: str = "kept") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fit(path: str = "kept", *more: str) -> list[str]:
    teacher = {"class_path": "CachedTeacher", "init_args": {"path": path}}
    Path("cached.json").write_text(json.dumps({"model": {"init_args": {"teacher": teacher}}}))
    recipe = ["--config", "glyphs_rkd", "--config", "cached.json", "--trainer.default_root_dir=run"]
    return ["fit", *recipe, *TINY, "--trainer.max_epochs=1", *more]


def test_intact_files_are_kept_and_damaged_ones_rewritten(capsys: Any) -> None:
    assert cli.main(cache()) == 0
    assert "written: kept" in capsys.readouterr().out
    whole, first = files(), Path("kept", shard_name(0))
    assert MANIFEST in whole
    assert len(whole) > 3
    old = first.stat().st_mtime_ns
    assert cli.main(cache()) == 0
    assert "nothing to do" in capsys.readouterr().out
    for name, content in (
        (shard_name(1), whole[shard_name(1)][:-5]),
        (shard_name(2), whole[shard_name(2)][:-1] + bytes([whole[shard_name(2)][-1] ^ 1])),
        (MANIFEST, b"{"),
    ):
        Path("kept", name).write_bytes(content)
    assert cli.main(cache()) == 0
    assert "written: kept" in capsys.readouterr().out
    assert files() == whole
    assert first.stat().st_mtime_ns == old


def test_another_teacher_or_data_set_needs_overwrite(whole: dict[str, bytes], capsys: Any) -> None:
    assert cli.main(cache("--data.max_classes=21")) == 1
    assert "data length: cached" in capsys.readouterr().err
    save_teacher(seed=1)
    assert cli.main(cache()) == 1
    message = capsys.readouterr().err
    assert "teacher weights: cached" in message
    assert "--overwrite" in message
    assert "data" not in message.split("something else:")[1].split("Use it")[0]
    Path("kept", MANIFEST).unlink()  # as in an interrupted run
    assert cli.main(cache()) == 1
    assert "teacher weights: cached" in capsys.readouterr().err
    assert files() == {name: content for name, content in whole.items() if name != MANIFEST}
    assert cli.main(cache("--overwrite")) == 0
    assert files().keys() == whole.keys()
    assert all(files()[name] != whole[name] for name in whole)


@pytest.mark.usefixtures("whole")
def test_a_recipe_trains_with_the_cache_alone(capsys: Any) -> None:
    Path("runs/glyphs_teacher/last.ckpt").unlink()
    assert cli.main(fit()) == 0
    assert cli.main(fit("kept", "--data.max_classes=21")) == 1
    assert "data length: cached" in capsys.readouterr().err
    assert cli.main(fit("nowhere")) == 1
    assert "lightning-rkd cache --config RECIPE --out nowhere" in capsys.readouterr().err


def test_views_are_those_of_training(capsys: Any) -> None:
    assert cli.main(cache("--data.views=2")) == 0
    assert json.loads(files()[MANIFEST])["views"] == 2
    assert cli.main(fit("kept", "--data.views=2")) == 0
    assert cli.main(fit()) == 1
    assert "data augmentation: cached" in capsys.readouterr().err


def test_without_a_recipe_or_a_teacher_the_error_says_what_is_missing(capsys: Any) -> None:
    assert cli.main(["cache"]) == 2
    assert "--config RECIPE" in capsys.readouterr().err
    assert cli.main(["cache", "--config", "glyphs_teacher", *TINY]) == 2
    assert "one teacher to cache, and it has 0" in capsys.readouterr().err


@posix_only
@pytest.mark.campaign
def test_a_killed_run_resumes_to_the_same_files() -> None:
    assert cli.main(cache("--shard_rows", "8", out="unbroken")) == 0
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = start(*cache("--shard_rows", "8", out=sent.name))
        while not Path(sent.name, shard_name(6)).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(sent)
        ended, output = end_of(process)
        assert ended == code, output
        assert not Path(sent.name, MANIFEST).exists()
        assert cli.main(cache("--shard_rows", "8", out=sent.name)) == 0
        assert files(sent.name) == files("unbroken")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(whole: dict[str, bytes]) -> None:
    """As torchrun starts them."""
    port = free_port()

    def run(rank: int) -> str:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in where.items()}, **LOOPBACK}
        return run_code(f"import os; os.environ.update({environment}); os.chdir({os.getcwd()!r})\n{MAIN}", *arguments)

    arguments = cache(out="two")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert files("two") == whole


def test_a_full_disk_is_an_error_and_the_next_run_resumes(
    whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written, original = [], cache_format.write_whole

    def full(path: Any, content: Any) -> None:
        if len(written) == 2:
            raise OSError(f"{str(path)!r} could not be written, and is what it was before: No space left on device")
        written.append(path)
        original(path, content)

    monkeypatch.setattr(cache_format, "write_whole", full)
    assert cli.main(cache(out="full")) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(files("full")) == 2
    monkeypatch.setattr(cache_format, "write_whole", original)
    assert cli.main(cache(out="full")) == 0
    assert files("full") == whole
