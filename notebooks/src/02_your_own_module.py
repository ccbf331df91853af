# %% [markdown]
# # 2. Attach it to your own LightningModule
#
# You have a working `LightningModule` and your own data. Without changing the module, this notebook
#
# - adds a relational loss with the callback `RelationalDistillation`;
# - measures retrieval with the callback `RetrievalEvaluation`;
# - reads the logged terms;
# - handles batches that are dictionaries, and shows the error for a wrong layer name.
#
# Replace the first two code cells by your data and your module.

# %% [markdown]
# ## Your data
#
# Any `DataLoader` works. Here a batch is a pair `(images, labels)` of glyphs, drawn with fonts that come with matplotlib. Nine
# fonts train, three others validate, and every image is distorted at random.

# %%
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.data import Augment
from lightning_rkd.data.datamodules.glyphs import render_glyphs

drawn, names = render_glyphs(28)  # (classes, fonts, 28, 28)
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
# The module knows nothing about distillation. Its `backbone` computes an embedding, and it logs its own metrics.

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
# Any `nn.Module` can be the teacher: a torchvision network, one from a checkpoint, or, here, a wider network of the same class.

# %%
import logging
import warnings

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
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
# ## Attach the callbacks
#
# `student_layer` is a dotted path to a submodule: `self.backbone` is `"backbone"`. A layer gives its output, whatever its class;
# [Layers](../docs/layers.md) has all forms. The default teacher layer is the teacher's output.

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
# `val/accuracy` is logged by the module. The other metrics come from `RetrievalEvaluation`, which read the backbone in
# `validation_step`. The same training without a teacher:

# %%
torch.manual_seed(1)
alone = fit(Classifier(width=6), epochs=10, callbacks=[RetrievalEvaluation("backbone")])

print(f"{'':20} {'alone':>8} {'with RKD':>9}")
for name in alone:
    print(f"{name:20} {alone[name]:8.3f} {distilled[name]:9.3f}")

# %% [markdown]
# A single run with one seed shows that it works, not how much it helps: see [notebook 4](04_choose_a_loss.ipynb).
#
# ## The log
#
# The terms are logged as `distill/<name>` to the trainer's loggers, here a CSV file:

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
# `weight=` and `task_weight=` take a number or a function of the epoch. This one increases the weight of the relations over ten
# epochs:

# %%
RelationalDistillation(teacher.backbone, RKD(), student_layer="backbone", weight=lambda epoch: min(1, epoch / 10))

# %% [markdown]
# ## The teacher is not part of the module
#
# It is in eval mode, and in neither the module's parameters nor its checkpoints:

# %%
print("modules:   ", [name for name, _ in student.named_children()])
print("state dict:", sorted({key.split(".")[0] for key in student.state_dict()}))

# %% [markdown]
# ## Batches that are dictionaries
#
# `inputs=` names the entry that the networks are called with, `labels=` that of the labels, which retrieval and some losses need.


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
# Nested batches, dataclasses, several inputs and inputs of the teacher's own are named in the same way; see
# [Batches](../docs/batches.md). For anything else override `unpack(self, batch)` of the callback and return a `lightning_rkd.Batch`.
#
# ## Steps that change the rows
#
# The teacher receives the batch as it was loaded. Where a step normalises or augments it row by row, that is usually meant. Where it
# permutes, resamples or mixes the rows, row i of the student and of the teacher are different samples; the first two steps warn:

# %%
import warnings


class Flipped(Classifier):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return super().training_step((images.flip(0), labels.flip(0)), batch_idx)


def train(**settings):
    distillation = RelationalDistillation(teacher.backbone, RKD(), student_layer="backbone", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = L.Trainer(max_epochs=1, limit_train_batches=5, callbacks=[distillation], logger=False, **QUIET)
        trainer.fit(Flipped(width=6), DataLoader(train_set, batch_size=64, shuffle=True))
    return [str(warning.message) for warning in caught if "rows" in str(warning.message)]


print(*train())

# %% [markdown]
# `input_layer` names the layer whose inputs the teacher receives too:

# %%
train(input_layer="backbone")

# %% [markdown]
# ## A wrong layer name
#
# The error lists the available names:

# %%
wrong = RelationalDistillation(teacher.backbone, RKD(), student_layer="backbon")
try:
    fit(Classifier(width=6), epochs=1, callbacks=[wrong])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Next
#
# - [03 What relations are](03_relations.ipynb), in pictures.
# - [04 Choose a loss](04_choose_a_loss.ipynb), or [the gallery](../docs/losses.md).
# - [06 Many devices, mixed precision, resume](06_devices_precision_resume.ipynb): the callback needs no other settings there.
# - [09 A teacher given as embeddings](09_embeddings_only.ipynb).
