# %% [markdown]
# # 1. Quickstart: a small student learns the geometry of a large teacher
#
# In about a minute on a CPU, without a download, this notebook
#
# - computes a relational loss;
# - trains a teacher to embed glyphs;
# - trains the same small student twice, alone and with the teacher;
# - compares the networks on glyphs that none of them has seen.

# %% [markdown]
# ## A relational loss compares geometries, not outputs
#
# A network maps every image to a point, its *embedding*. `RKD` compares the distances between all pairs of points in a batch, and
# the angles in all triplets, between student and teacher. The widths of the two embeddings may differ.

# %%
import torch

from lightning_rkd import RKD, RKDAngle, RKDDistance

torch.manual_seed(0)
teacher_embedding = torch.randn(32, 128)
student_embedding = torch.randn(32, 8, requires_grad=True)

loss = RKD()(student_embedding, teacher_embedding)
loss.backward()
print(f"random student: {loss.item():.4f}")

# %% [markdown]
# Translation, scale and rotation of the embedding do not change the loss:

# %%
rotation, _ = torch.linalg.qr(torch.randn(128, 128))
moved = 7 * teacher_embedding @ rotation + 100
print(f"the teacher itself, enlarged, turned and moved: {RKD()(moved, teacher_embedding).item():.0e}")

# %% [markdown]
# Losses can be weighted and added. These are the weights of the paper for classification:

# %%
weighted = 25 * RKDDistance() + 50 * RKDAngle()
print(f"weighted sum: {weighted(student_embedding, teacher_embedding).item():.3f}")

# %% [markdown]
# ## Data: glyphs of many scripts
#
# The images are drawn with fonts that come with matplotlib. A class is a glyph, and test classes are disjoint from training
# classes.

# %%
from lightning_rkd.data import GlyphDataModule

data = GlyphDataModule()
data.setup()
images, labels = data.root.images[data.test_set.indices], data.root.labels[data.test_set.indices]
print(f"{data.num_train_classes} training classes, {len(labels.unique())} test classes")
print("some test classes:", " ".join(data.class_names[c] for c in labels.unique()[::8]))

# %% [markdown]
# ## Train a teacher
#
# Without a teacher, `DistillationModule` trains a network with a task loss. The task loss can come from
# [pytorch-metric-learning](https://github.com/KevinMusgrave/pytorch-metric-learning) or PyTorch.

# %%
# %matplotlib inline
import logging
import warnings

import lightning as L
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import DistillationModule, EmbeddingRetrieval
from lightning_rkd.models import ConvNet, count_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def train(student, steps, learning_rate, teacher=None, loss=None):
    module = DistillationModule(
        student,
        teacher=teacher,
        loss=loss,
        task_loss=TripletMarginLoss(margin=0.2),
        metrics={"retrieval": EmbeddingRetrieval()},
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps),
        lr_interval="step",
    )
    # the data module divides its batches over devices, hence use_distributed_sampler=False
    trainer = L.Trainer(max_steps=steps, use_distributed_sampler=False, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]


# %%
torch.manual_seed(0)
teacher = ConvNet(widths=(16, 32, 64), depth=1, embedding_dim=64, normalize=True)
results = {"teacher": train(teacher, steps=300, learning_rate=1e-2)}
results["teacher"]

# %% [markdown]
# `recall_at_1` is the share of test images whose nearest other image belongs to the same class.
#
# ## The same student, alone and distilled
#
# Initialisation, batches and number of steps are the same. The only difference is the relational loss.


# %%
def small_net():
    return ConvNet(widths=(8, 16, 16), depth=1, embedding_dim=32)


networks = {"teacher": teacher}
for name, how in {"student alone": {}, "student with RKD": {"teacher": teacher, "loss": RKD()}}.items():
    torch.manual_seed(1)
    networks[name] = small_net()
    results[name] = train(networks[name], steps=150, learning_rate=3e-2, **how)

for name, result in results.items():
    size = count_parameters(networks[name])
    print(f"{name:17} {size:>7,} parameters   recall@1 {result['test/recall_at_1']:.3f}")

# %% [markdown]
# ## How well did the student preserve the teacher's geometry?
#
# `RelationalAgreement` compares two embeddings of the same images: the overlap of their neighbours, the rank correlation of
# their distances, and the gap between their angles.

# %%
from lightning_rkd import RelationalAgreement

test_images = torch.stack([x for x, _ in data.test_set])
embeddings = {}
with torch.no_grad():
    for name, network in networks.items():
        embeddings[name] = network.eval()(test_images)

for name in ("student alone", "student with RKD"):
    agreement = RelationalAgreement()
    agreement.update(embeddings[name], embeddings["teacher"])
    print(f"{name:17}", {key: round(value.item(), 3) for key, value in agreement.compute().items()})

# %% [markdown]
# Overlap and correlation: higher is better. Angle gap, in degrees: lower is better.
#
# The pictures are test images and the nearest images that each network finds. Blue with a check mark is the same class.

# %%
from lightning_rkd import plots

plots.neighbours(images, labels, embeddings)

# %% [markdown]
# ## Attach it to your own module
#
# The module does not change. Name the layer whose output is the embedding:

# %%
from torch import nn

from lightning_rkd import RelationalDistillation


class Mine(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = small_net()
        self.classifier = nn.Linear(32, data.num_train_classes)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.classifier(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


distillation = RelationalDistillation(teacher=teacher, loss=RKD(), student_layer="backbone")
trainer = L.Trainer(max_steps=20, callbacks=[distillation], use_distributed_sampler=False, **QUIET)
trainer.fit(Mine(), data.train_dataloader())
print(f"distill/rkd after {trainer.global_step} steps: {trainer.callback_metrics['distill/rkd']:.3f}")

# %% [markdown]
# ## Next
#
# - [02 Attach it to your own LightningModule](02_your_own_module.ipynb): your data, your logging, your metrics.
# - [03 What relations are](03_relations.ipynb), in pictures.
# - On the command line: `lightning-rkd demo`, `lightning-rkd fit --config glyphs_rkd`.
