"""A loss of another package: ten lines and an entry point, known to the command line by its short name."""

import csv
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from lightning_rkd.cli import trainer
from lightning_rkd.models import Classified, ConvNet
from tests.harness.forks import run_code

LOSS = """
from lightning_rkd.losses import RelationalLoss


class MeanGap(RelationalLoss):
    def forward(self, student, teacher):
        return (student.mean() - teacher.mean()).square()
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mean-gap"
version = "1.0"

[project.entry-points."lightning_rkd.losses"]
MeanGap = "mean_gap:MeanGap"
"""
FIT = [
    *("fit", "--config", "glyphs_distill", "--model.loss", "MeanGap"),
    *("--model.lr_scheduler=null", "--data.image_size=12", "--data.classes_per_batch=4", "--data.samples_per_class=3"),
    *("--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=CSVLogger"),
    *("--trainer.logger.save_dir=logs", "--trainer.logger.name=", "--trainer.logger.version="),
]


def install(loss: str, folder: Path) -> Path:
    """Build a package with a loss, and unpack its wheel into a folder for ``sys.path``."""
    (folder / "mean_gap.py").write_text(loss)
    (folder / "pyproject.toml").write_text(PROJECT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


PROGRAM = """
import os, sys, warnings
from lightning_rkd.cli.main import main
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv.pop(1))
os.chdir(sys.argv.pop(1))
sys.exit(main())
"""


@pytest.mark.slow
def test_an_installed_loss_trains_by_its_short_name_and_logs_under_its_own(tmp_path: Path) -> None:
    site = install(LOSS, tmp_path)
    weights = tmp_path / "runs" / "glyphs_classifier_teacher" / "last.ckpt"
    weights.parent.mkdir(parents=True)
    teacher = Classified(ConvNet(widths=(24, 48, 96), embedding_dim=128), num_classes=315)
    torch.save(teacher.state_dict(), weights)
    run_code(PROGRAM, str(site), str(tmp_path), *FIT)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row.get("distill/mean_gap"))
    assert float(row["distill/mean_gap"]) > 0


def test_a_package_whose_loss_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="the program needs the extra cli")
    broken = EntryPoint("MeanGap", "a_module_that_is_missing:MeanGap", "lightning_rkd.losses")
    monkeypatch.setattr(trainer, "entry_points", lambda group: [broken] if group == broken.group else [])
    with pytest.raises(ImportError, match=r"the loss 'MeanGap' of the installed package .* cannot be imported"):
        trainer.import_public_classes()
