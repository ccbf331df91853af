# %% [markdown]
# # 2. Attach it to your own LightningModule
#
# You have a `LightningModule` that works, and data that are yours. Here you will see how to
#
# - add a relational loss without a change to the module: the callback `RelationalDistillation`;
# - measure retrieval without a change to the module: the callback `RetrievalEvaluation`;
# - find the terms in your own log, next to what the module logs;
# - say where things are when batches are dictionaries, and what happens when a name is wrong.
#
# Replace the first two cells by your data and your module; the rest stays.

# %% [markdown]
# ## Your data
#
# Any `DataLoader` will do. Here images and labels are tensors, and a batch is a pair `(images, labels)`: letters, drawn with
# fonts that are on your machine, because a notebook must work without a download. Nine fonts train, three others validate,
# and every picture is distorted in its own way.

# %%
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.data import Augment
from lightning_rkd.data.datamodules.glyphs import render_glyphs

drawn, names = render_glyphs(28)  # (letters, fonts, 28, 28)
drawn, names = torch.from_numpy(drawn[::10]).float() / 255, names[::10]
distort = Augment(rotation=20, scale=0.25, shear=0.3, shift=0.1, noise=0.2)


def pictures(fonts, copies, seed):
    images = drawn[:, fonts].repeat(1, copies, 1, 1)
    labels = torch.arange(len(images)).repeat_interleave(images.shape[1])
    images = images.flatten(0, 1).unsqueeze(1)
    return TensorDataset(distort(images, seed, 0, range(len(images))), labels)


train_set, val_set = pictures(slice(0, 9), copies=6, seed=0), pictures(slice(9, 12), copies=4, seed=1)
print(f"{len(train_set)} images to train with, {len(val_set)} to validate with, {len(names)} classes: {names}")

# %% [markdown]
# ## Your module
#
# Nothing in it knows about distillation. It has a `backbone` that makes an embedding, and logs what it likes.

# %%
import lightning as L
from torch import nn


class Classifier(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(8 * width, len(names))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)), y)
        self.log("train/cross_entropy", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/accuracy", (self.head(self.backbone(x)).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# %% [markdown]
# ## A teacher
#
# Any `nn.Module` can teach: from torchvision, from a checkpoint, or, as here, a wider one of the same class.

# %%
import logging
import warnings

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a notebook needs fewer words
warnings.filterwarnings("ignore", module="lightning")
QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(module, epochs, callbacks=(), logger=False):
    loaders = DataLoader(train_set, batch_size=64, shuffle=True), DataLoader(val_set, batch_size=256)
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), logger=logger, log_every_n_steps=5, **QUIET)
    trainer.fit(module, *loaders)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


torch.manual_seed(0)
teacher = Classifier(width=48)
fit(teacher, epochs=12)

# %% [markdown]
# ## Attach it
#
# Two callbacks, and the module is as it was. `student_layer` and `teacher_layer` are names as you would write them in
# Python: `self.backbone` is `"backbone"`. The default teacher layer is the teacher's output.

# %%
from lightning.pytorch.loggers import CSVLogger

from lightning_rkd import RKD, RelationalDistillation, RetrievalEvaluation

torch.manual_seed(1)
student = Classifier(width=6)
distillation = RelationalDistillation(
    teacher=teacher.backbone,  # called with the batch's inputs
    loss=RKD(),
    student_layer="backbone",
)
retrieval = RetrievalEvaluation("backbone")
logger = CSVLogger("logs", name="distilled", version=0)
distilled = fit(student, epochs=10, callbacks=[distillation, retrieval], logger=logger)
distilled

# %% [markdown]
# `val/accuracy` is the module's own. The other numbers come from `RetrievalEvaluation`, which read the backbone in
# `validation_step`. The same without a teacher:

# %%
torch.manual_seed(1)
alone = fit(Classifier(width=6), epochs=10, callbacks=[RetrievalEvaluation("backbone")])

print(f"{'':20} {'alone':>8} {'with RKD':>9}")
for name in alone:
    print(f"{name:20} {alone[name]:8.3f} {distilled[name]:9.3f}")

# %% [markdown]
# One run each, with one seed: enough to see that it works, too little to say how much it helps. For that there is
# [notebook 4](04_choose_a_loss.ipynb).
#
# ## Your own log
#
# The terms are logged as `distill/<name>` to whatever logger the trainer has. Here it was a CSV file:

# %%
import csv

import matplotlib.pyplot as plt

with open("logs/distilled/version_0/metrics.csv") as file:
    rows = list(csv.DictReader(file))

figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
for axis, name in zip(axes, ("train/cross_entropy", "distill/rkd", "val/recall_at_1"), strict=True):
    points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
    axis.plot(*zip(*points, strict=True), color="#0072b2")
    axis.set(title=name, xlabel="step", ylim=(0, None))
plt.show()

# %% [markdown]
# What your loss weighs against the relations is yours to say: `weight=` and `task_weight=` take a number, or a function of
# the epoch. This one lets the relations fade in over ten epochs:

# %%
RelationalDistillation(teacher.backbone, RKD(), student_layer="backbone", weight=lambda epoch: min(1, epoch / 10))

# %% [markdown]
# ## What stays outside
#
# The teacher is in eval mode while it teaches, and no part of your module: not in its parameters, not in its checkpoints.

# %%
print("modules:   ", [name for name, _ in student.named_children()])
print("state dict:", sorted({key.split(".")[0] for key in student.state_dict()}))

# %% [markdown]
# ## Batches that are dictionaries
#
# Say which entry is the input. `labels=` says where the labels are; retrieval needs them, and some losses do.


# %%
class Named(torch.utils.data.Dataset):
    def __len__(self):
        return len(train_set)

    def __getitem__(self, row):
        image, label = train_set[row]
        return {"image": image, "target": label}


class FromNames(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["target"]), batch_idx)


distillation = RelationalDistillation(
    teacher.backbone, RKD(), student_layer="backbone", inputs="image", labels="target"
)
trainer = L.Trainer(max_epochs=1, limit_train_batches=5, callbacks=[distillation], logger=False, **QUIET)
trainer.fit(FromNames(width=6), DataLoader(Named(), batch_size=64, shuffle=True))
print(f"distill/rkd: {trainer.callback_metrics['distill/rkd']:.3f}")

# %% [markdown]
# Batches of any other make: override `unpack(self, batch)` of the callback and return a `lightning_rkd.utils.types.Batch`.
#
# ## When a name is wrong
#
# Nothing is skipped in silence. The message says what there is:

# %%
wrong = RelationalDistillation(teacher.backbone, RKD(), student_layer="backbon")
try:
    fit(Classifier(width=6), epochs=1, callbacks=[wrong])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Where next
#
# - [03 What relations are](03_relations.ipynb), in pictures.
# - [04 Choose a loss](04_choose_a_loss.ipynb), or look through [the gallery](../docs/losses.md).
# - [06 Many devices, mixed precision, resume](06_devices_precision_resume.ipynb): the callback needs no other settings there.
# - [09 A teacher you only have embeddings of](09_embeddings_only.ipynb).
