# %% [markdown]
# # 5. Write your own loss
#
# A relational loss is a function of two tensors. Here you will
#
# - write one, centred kernel alignment (Kornblith et al. 2019), in a dozen lines;
# - use it alone, in the module, in a sum with others, and from YAML;
# - get more than embeddings: labels, several fields, parameters of its own;
# - see what the base class catches for you.

# %%
import logging
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a notebook needs fewer words
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## The loss
#
# Two Gram matrices, centred; one minus the cosine between them. The widths may differ: a Gram matrix is (N, N) on both sides.

# %%
from lightning_rkd import RelationalLoss


class CKA(RelationalLoss):
    """Aligns the centred Gram matrices of student and teacher: (N, D_s), (N, D_t) -> scalar."""

    def forward(self, student, teacher):
        grams = [x @ x.T for x in (student - student.mean(0), teacher - teacher.mean(0))]
        s, t = (F.normalize(gram.flatten(), dim=0) for gram in grams)
        return 1 - s @ t


torch.manual_seed(0)
student, teacher = torch.randn(32, 8, requires_grad=True), torch.randn(32, 64)
loss = CKA()(student, teacher)
loss.backward()
print(f"loss {loss.item():.4f}, gradient of shape {tuple(student.grad.shape)}")

# %% [markdown]
# A check that costs nothing: the loss of the teacher with itself is 0, and it should not mind a rotation or another scale.

# %%
turn = torch.linalg.qr(torch.randn(64, 64)).Q
for name, x in {
    "itself": teacher,
    "turned": teacher @ turn,
    "scaled and moved": 3 * teacher + 5,
    "other rows": teacher.flip(0),
}.items():
    print(f"{name:18} {CKA()(x, teacher).item():.6f}")

# %% [markdown]
# ## What the base class does
#
# `forward` sees checked tensors: matrices of as many rows, the teacher detached, both in float32 or float64 whatever autocast says,
# NaN found with its row.

# %%
for student_rows, teacher_rows in (
    (torch.randn(4, 8), torch.randn(5, 8)),
    (torch.full((4, 8), torch.nan), torch.randn(4, 8)),
):
    try:
        CKA()(student_rows, teacher_rows)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Use it
#
# Wherever a loss goes. Weighed and added with the operators; the keys of a dict are the names in the log.

# %%
from lightning_rkd import RKD, DistillationModule, EmbeddingRetrieval
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet

data = GlyphDataModule(max_classes=60, image_size=16, classes_per_batch=12, samples_per_class=4, batches_per_epoch=30)


def train(module, epochs=3):
    trainer = L.Trainer(
        max_epochs=epochs, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data)
    logged = {name: f"{value.item():.4f}" for name, value in trainer.callback_metrics.items()}
    return logged, trainer.test(module, data, verbose=False)[0]["test/recall_at_1"]


from pytorch_metric_learning.losses import TripletMarginLoss

torch.manual_seed(0)
big = DistillationModule(
    ConvNet((16, 32), embedding_dim=32), task_loss=TripletMarginLoss(), metrics={"retrieval": EmbeddingRetrieval()}
)
_, score = train(big, epochs=6)
print(f"teacher: recall@1 {score:.3f}")

torch.manual_seed(1)
small = DistillationModule(
    ConvNet((6, 12), embedding_dim=8, depth=1),
    teacher=big.student,
    loss={"cka": 0.5 * CKA(), "rkd": RKD()},
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    metrics={"retrieval": EmbeddingRetrieval()},
)
logged, score = train(small, epochs=6)
print(f"student: recall@1 {score:.3f}, logged {logged}")

# %% [markdown]
# ## More than embeddings
#
# Ask by keyword, and it is there: `labels`, `indices`, `view`, `epoch`, `mix`. This one looks only at pairs of different classes:


# %%
class BetweenClasses(RelationalLoss):
    """Distances between samples of different classes, as shares of their mean."""

    def forward(self, student, teacher, *, labels):
        apart = labels[:, None] != labels[None, :]
        s, t = (torch.cdist(x, x)[apart] for x in (student, teacher))
        return F.smooth_l1_loss(s / s.mean(), t / t.mean())


labels = torch.arange(32) // 4
print(f"{BetweenClasses()(student, teacher, labels=labels).item():.4f}")
print("needs:", sorted(BetweenClasses().needs))

# %% [markdown]
# What else a class can say of itself:
#
# - `reads = "logits"`, `"feature_maps"`, or a tuple of fields: what of the networks it is given;
# - `gather = False`: a mean of per-sample terms, which is then never gathered over devices;
# - parameters of its own, whose sizes come from the networks: `build(self, student_dim, teacher_dim)`. They are trained and saved
#   with the student, by module and callback alike.


# %%
class Mapped(RelationalLoss):
    """Every row of the teacher, predicted by a linear map from the student's."""

    gather = False

    def __init__(self, student_dim=None, teacher_dim=None):
        super().__init__()
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim, teacher_dim):
        self.map = nn.Linear(student_dim, teacher_dim)

    def forward(self, student, teacher):
        return F.mse_loss(self.map(student), teacher)


torch.manual_seed(1)
module = DistillationModule(ConvNet((6, 12), embedding_dim=8, depth=1), teacher=big.student, loss=Mapped())
trainer = L.Trainer(
    max_epochs=1, limit_train_batches=2, limit_val_batches=0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, accelerator="cpu",
)  # fmt: skip
trainer.fit(module, data)
print("a map of its own, found by itself:", tuple(module.loss.map.weight.shape))

# %% [markdown]
# ## From YAML
#
# Put the class into a file of your own, and name it by its path:

# %%
from pathlib import Path

_ = Path("mine.py").write_text('''
from torch.nn import functional as F

from lightning_rkd import RelationalLoss


class CKA(RelationalLoss):
    """Aligns the centred Gram matrices of student and teacher."""

    def forward(self, student, teacher):
        grams = [x @ x.T for x in (student - student.mean(0), teacher - teacher.mean(0))]
        s, t = (F.normalize(gram.flatten(), dim=0) for gram in grams)
        return 1 - s @ t
''')

# %% [markdown]
# `python -m lightning_rkd.cli fit --config glyphs_rkd --model.loss mine.CKA`, or `loss: {class_path: mine.CKA}` in a configuration.
# The folder of `mine.py` must be where Python looks for modules, such as the one that you are in.

# %%
import importlib
import sys

sys.path.insert(0, "")
print(importlib.import_module("mine").CKA())

# %% [markdown]
# ## Into this library
#
# One file, one line that exports it, and a contract test covers it: finite and right gradients, the invariances that it declares
# and no other, duplicates, half precision, two devices against one.
# [CONTRIBUTING](../CONTRIBUTING.md) shows the whole of it with this very loss.
#
# ## Where next
#
# - [04 Choose a loss](04_choose_a_loss.ipynb): does yours help? `lightning-rkd compare` takes it by its path.
# - [The gallery](../docs/losses.md): thirty others to read.
