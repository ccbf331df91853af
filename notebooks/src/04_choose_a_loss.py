# %% [markdown]
# # 4. Choose a loss
#
# Which relations, and with which weight? This notebook
#
# - lists the losses, which share one interface;
# - finds weights from gradients;
# - compares losses over several seeds with `lightning-rkd compare`, with weights chosen on validation data;
# - explains the resulting table.

# %% [markdown]
# ## The losses
#
# Some read embeddings, some logits, some feature maps. Each states its paper and the published weight.
# [The gallery](../docs/losses.md) has the equations.

# %%
import lightning_rkd.losses
from lightning_rkd import RelationalLoss

found = [getattr(lightning_rkd.losses, name) for name in lightning_rkd.losses.__all__]
losses = [
    cls for cls in found if isinstance(cls, type) and issubclass(cls, RelationalLoss) and cls.reference is not None
]
print(f"{len(losses)} losses, for instance:")
for cls in losses[::5]:
    weight = "-" if cls.reference.weight is None else f"{cls.reference.weight:g}"
    print(
        f"  {cls.__name__:22} reads {cls.reads!s:32.32} published weight {weight:>6}   {cls.reference.citation.split(',')[0]}"
    )

# %% [markdown]
# ## Weights from gradients
#
# Losses differ in scale, and published weights belong to the batch sizes and networks of their papers. `balance=1` matches the
# gradient norms of a loss and the task in every step. The resulting weight is logged and is a good starting point.

# %%
import logging
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import RKD, DistillationModule
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.losses import PKT, SimilarityPreserving
from lightning_rkd.models import ConvNet

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")
QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

data = GlyphDataModule(max_classes=100)


def train(student, steps, learning_rate, logger=False, **how):
    module = DistillationModule(
        student,
        task_loss=TripletMarginLoss(margin=0.2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps),
        lr_interval="step",
        **how,
    )
    trainer = L.Trainer(
        max_steps=steps, use_distributed_sampler=False, limit_val_batches=0, logger=logger, log_every_n_steps=1, **QUIET
    )
    trainer.fit(module, data)


torch.manual_seed(0)
teacher = ConvNet(widths=(16, 32, 64), depth=1, embedding_dim=64, normalize=True)
train(teacher, steps=100, learning_rate=1e-2)

# %%
import csv
import statistics

for loss in (RKD(), PKT(), SimilarityPreserving()):
    name = type(loss).__name__
    torch.manual_seed(1)
    student = ConvNet(widths=(8, 16, 16), depth=1, embedding_dim=32)
    logger = CSVLogger("logs", name=name, version=0)
    train(student, steps=40, learning_rate=3e-2, logger=logger, teacher=teacher, loss={"loss": loss}, balance=1.0)
    with open(f"logs/{name}/version_0/metrics.csv") as file:
        weights = [float(row["balance/loss"]) for row in csv.DictReader(file) if row["balance/loss"]]
    print(f"{name:22} balanced by a weight of about {statistics.median(weights[20:]):,.3g}")

# %% [markdown]
# The weights differ by orders of magnitude. Without balancing, a comparison of losses is mostly one of weights.
#
# ## A comparison
#
# `lightning-rkd compare` reads a YAML file: a recipe, and what differs between networks. This one is small: few classes, short
# trainings, two seeds. The values behind `--tune` are trained with the first seed and selected on validation data.

# %%
from pathlib import Path

_ = Path("mine.yaml").write_text("""\
title: Losses on glyphs
recipe: glyphs_rkd
teacher: {recipe: glyphs_teacher, seed: 0}
set: {data.max_classes: 100}
steps: 60
seeds: [0, 1]
baseline: student alone
networks:
  student alone: {loss: null}
  RKD: {loss: RKD, weight: 1}
  PKT: {loss: PKT, weight: 4000}
scores: [recall_at_1, map_at_r]
select: map_at_r
""")

# %% [markdown]
# The command is
#
# ```
# lightning-rkd compare --config mine.yaml --tune RKD.weight=0.5,2 --jobs 2 --out runs/mine
# ```
#
# and displays progress bars. Here it runs in a subprocess:

# %%
import os
import subprocess
import sys

command = ["compare", "--config", "mine.yaml", "--tune", "RKD.weight=0.5,2", "--jobs", "2", "--out", "runs/mine"]
plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # notebooks set it
done = subprocess.run([sys.executable, "-m", "lightning_rkd.cli", *command], env=plain, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
print(*done.stdout.splitlines()[:6], sep="\n")

# %% [markdown]
# ## Read the table

# %%
from IPython.display import Image, Markdown

text = Path("runs/mine/table.md").read_text()
table = [line for line in text.splitlines() if line.startswith("|")]
Markdown("\n".join(table))

# %% [markdown]
# - **mean ± deviation** over the seeds.
# - **difference to the baseline**, paired by seed because runs of one seed share initial weights and batches, with its 95 %
#   interval. If the interval contains zero, no difference is established; with two seeds, as here, it almost always does. Use five.
# - **parameters, time**: the cost.
#
# The weights that were tried, on validation data:

# %%
print(Path("runs/mine/tune.csv").read_text())

# %%
Image("runs/mine/plot.png", width=700)

# %% [markdown]
# Dots are runs, bars are means, lines are intervals, the dashed line is the baseline.
#
# Running the command again trains nothing; further networks or seeds train only what is new. In `runs/mine` every run keeps its
# checkpoint and the `config.yaml` that `lightning-rkd fit --config` trains it with:

# %%
print(sorted(path.name for path in Path("runs/mine").iterdir()))

# %% [markdown]
# ## Next
#
# - [All keys of a comparison](../docs/compare.md), and [all losses on one student](../docs/losses_on_glyphs.md).
# - [05 Write your own loss](05_write_your_own_loss.ipynb), and compare it in the same way.
# - [07 Classification with RKD and soft targets](07_classification.ipynb).
