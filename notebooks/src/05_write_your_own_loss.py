# %% [markdown]
# # 5. Write your own loss
#
# A relational loss is a function of two tensors. This notebook
#
# - implements centred kernel alignment (Kornblith et al. 2019) in a dozen lines;
# - uses it alone, in the module, in a sum, and from YAML;
# - adds labels, further fields and parameters.

# %%
import logging
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## The loss
#
# One minus the cosine between the centred Gram matrices. The widths may differ, since both Gram matrices are (N, N).

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
# The loss of the teacher with itself is 0, and it is invariant to rotation and scale:

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
# ## The base class
#
# `RelationalLoss` checks the inputs before `forward`: two matrices with the same number of rows, finite values, the teacher detached,
# both in float32 or float64 whatever the autocast setting.

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
# A custom loss works like any other. Losses are weighted and added with operators; the keys of a dict are the names in the log.

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
# ## Labels and other inputs
#
# Keyword-only parameters of `forward` request more: `labels`, `indices`, `view`, `epoch`, `mix`. This loss compares only pairs of
# different classes:


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
# A class can also declare
#
# - `reads = "logits"`, `"feature_maps"`, or a tuple of fields: what it reads of the networks;
# - `gather = False`: a mean of per-sample terms, which needs no gathering over devices;
# - parameters whose shapes depend on the networks, created in `build(self, student_dim, teacher_dim)`. Module and callback train and
#   save them with the student.


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
print("shape of the map:", tuple(module.loss.map.weight.shape))

# %% [markdown]
# ## From YAML
#
# Put the class into a file and refer to it by its path:

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
# The folder of `mine.py` must be on Python's module path, such as the current folder.

# %%
import importlib
import sys

sys.path.insert(0, "")
print(importlib.import_module("mine").CKA())

# %% [markdown]
# ## Contribute it
#
# One file and one export: the contract test then checks finite and correct gradients, the declared invariances, duplicates, half
# precision, and two devices against one. [CONTRIBUTING](../CONTRIBUTING.md) describes the steps with this loss.
#
# ## Next
#
# - [04 Choose a loss](04_choose_a_loss.ipynb): `lightning-rkd compare` accepts your loss by its path.
# - [The gallery](../docs/losses.md): all losses, to read.
