# %% [markdown]
# # 7. Classification: relations and soft targets
#
# In classification a teacher offers soft targets (Hinton, Vinyals and Dean 2015) and relations between images (RKD). Here a small
# student learns from labels alone, from either, and from both.
#
# ## The data
#
# CIFAR-100 if the environment variable `CIFAR100` names the folder of `cifar-100-python.tar.gz`. Otherwise, without a download,
# glyphs: fonts with bold and oblique faces that are held out of training.

# %%
import logging
import os
import warnings

import lightning as L
import torch
from torch import nn

from lightning_rkd.data import CIFARDataModule, GlyphDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

sizes = {"classes_per_batch": 16, "samples_per_class": 4, "batches_per_epoch": 50, "split_by": "samples"}
if folder := os.environ.get("CIFAR100"):
    data, channels = CIFARDataModule(folder, validation=0.02, **sizes), 3
else:
    data, channels = GlyphDataModule(max_classes=120, image_size=20, **sizes), 1
data.prepare_data()
data.setup("fit")
print(f"{type(data).__name__}: {len(data.train_set)} images to train with, {len(data.test_set)} to test with")
print(f"{data.num_train_classes} classes")

# %% [markdown]
# ## Teacher and student
#
# `Classified` adds a linear classifier to an embedding network. The output of the layer `"backbone"` is the embedding, that of
# `"classifier"` the logits.

# %%
from torchmetrics.classification import MulticlassAccuracy

from lightning_rkd import DistillationModule
from lightning_rkd.models import Classified, ConvNet, count_parameters

EPOCHS = 8


def network(widths, depth):
    backbone = ConvNet(widths, embedding_dim=64, in_channels=channels, depth=depth)
    return Classified(backbone, num_classes=data.num_train_classes)


def module(net, epochs=EPOCHS, **distillation):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * data.batches_per_epoch)

    return DistillationModule(
        net,
        task_loss=nn.CrossEntropyLoss(),
        task_reads="logits",
        student_layer={"embedding": "backbone", "logits": "classifier"},
        metrics={"accuracy": MulticlassAccuracy(data.num_train_classes, average="micro")},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=schedule,
        lr_interval="step",
        **distillation,
    )


def train(own, epochs=EPOCHS):
    trainer = L.Trainer(
        max_epochs=epochs, limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, logger=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(own, data)
    return trainer.test(own, data, verbose=False)[0]["test/accuracy"]


torch.manual_seed(0)
teacher = module(network((16, 32, 64), depth=2), epochs=10)
score = train(teacher, epochs=10)
print(f"teacher: {count_parameters(teacher.student):,} parameters, accuracy {score:.3f}")

# %% [markdown]
# ## Four students
#
# Initialisation and batches are the same. Soft targets have the usual weight of 0.9, which leaves 0.1 to the labels. RKD has the
# weights 1 for distances and 2 for angles, which suit this short training; the paper uses 25 and 50 in long ones. A dict of losses
# is their sum, and its keys are the names in the log.

# %%
from lightning_rkd import RKD
from lightning_rkd.losses import SoftTarget

soft, relations = 0.9 * SoftTarget(temperature=4), RKD(distance_weight=1, angle_weight=2)
ways = {
    "labels": {},
    "labels + RKD": {"loss": {"rkd": relations}},
    "soft targets": {"loss": {"soft": soft}, "task_weight": 0.1},
    "soft targets + RKD": {"loss": {"soft": soft, "rkd": relations}, "task_weight": 0.1},
}
taught = {"teacher": teacher.student, "teacher_layer": {"embedding": "backbone", "logits": "classifier"}}
accuracy = {}
for name, way in ways.items():
    torch.manual_seed(1)
    student = module(network((8, 16, 16), depth=1), **(way | taught if way else {}))
    accuracy[name] = train(student)
    print(f"{name:20} {accuracy[name]:.3f}")

# %% [markdown]
# ## Results

# %%
gains = {name: 100 * (value - accuracy["labels"]) for name, value in accuracy.items() if name != "labels"}
best = max(gains, key=gains.get)
print(", ".join(f"{name}: {gain:+.1f} points" for name, gain in gains.items()))
print(f"Most was gained by {best}.")

# %% [markdown]
# A single run with one seed shows how the parts fit together, not which method is best. [The results](../docs/results.md) have
# CIFAR-100 with several seeds and intervals.
#
# On the command line, `lightning-rkd fit --config cifar100_resnet32x4` and then `cifar100_resnet32x4_resnet8x4` train a pair that
# many papers report, with the published settings.
#
# ## Next
#
# - [04 Choose a loss](04_choose_a_loss.ipynb): several seeds, weights chosen on validation data.
# - [The gallery](../docs/losses.md): which losses read logits, embeddings or feature maps.
# - [06 Many devices, mixed precision, resume](06_devices_precision_resume.ipynb).
