# %% [markdown]
# # 9. A teacher given as embeddings
#
# The best teacher may not be available as a network: it may be a service, an older system, or a model of another modality. A table
# of its embeddings is sufficient for relational distillation.
#
# Here a student of a few thousand parameters learns from embeddings in a file.
#
# ## The table, and the embeddings
#
# Products with a name, a price and a weight. The student sees cheap features: hashed letter pairs and two numbers. The teacher's
# embeddings are synthetic: they follow the hidden kinds of the products, as those of a large language model would, and are written
# to a file.

# %%
import itertools
import logging
import warnings

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

rng = np.random.default_rng(0)
KINDS = {
    "pan": (30, 1.2),
    "pot": (45, 2.0),
    "knife": (25, 0.2),
    "chair": (80, 6.0),
    "table": (200, 25.0),
    "shelf": (120, 15.0),
}
MATERIALS = {"steel": 1.3, "oak": 1.6, "plastic": 0.6, "bamboo": 0.9}
rows = []
for (kind, (price, weight)), (material, factor) in itertools.product(KINDS.items(), MATERIALS.items()):
    for _ in range(50):
        maker = "".join(rng.choice(list("aeiobcdfhklmnprst"), 24))
        rows.append(
            (
                f"{maker} {material} {kind}",
                price * factor * rng.lognormal(0, 0.3),
                weight * rng.lognormal(0, 0.3),
                kind,
                material,
            )
        )

kinds, materials = list(KINDS), list(MATERIALS)
axes = rng.normal(size=(len(kinds) + len(materials), 256))
meaning = np.stack([axes[kinds.index(r[3])] + 0.7 * axes[len(kinds) + materials.index(r[4])] for r in rows])
np.save("teacher.npy", (meaning + 0.5 * rng.normal(size=meaning.shape)).astype("float32"))
print(*(f"{name!r}, {price:.2f}, {weight:.2f} kg" for name, price, weight, *_ in rows[:3]), sep="\n")
print(f"{len(rows)} products; teacher.npy holds {meaning.shape[1]} numbers for each")

# %% [markdown]
# The student's features are pairs of characters of the name, hashed into 256 bins, and the two numbers on a logarithmic scale.

# %%
import zlib


def features(name, price, weight):
    found = torch.zeros(258)
    for pair in itertools.pairwise(f" {name} "):
        found[zlib.crc32("".join(pair).encode()) % 256] += 1
    found[256:] = torch.tensor([price, weight]).log() / 3
    return found


x = torch.stack([features(*row[:3]) for row in rows])
y = torch.tensor([kinds.index(row[3]) * len(materials) + materials.index(row[4]) for row in rows])
train_set, test_set = random_split(TensorDataset(x, y), [0.7, 0.3], generator=torch.Generator().manual_seed(0))
print(f"{len(train_set)} rows to train with, {len(test_set)} to test with, in {len(y.unique())} groups")

# %% [markdown]
# ## Teach from the file
#
# `CachedTeacher.from_array` accepts a tensor, an array, a `.npy` or a `.safetensors` file. Row i belongs to row i of the *whole* data
# set, and the library tracks which rows a batch holds, also through a `random_split`. No labels are used.

# %%
from lightning_rkd import RKD, CachedTeacher, DistillationModule, EmbeddingRetrieval

teacher = CachedTeacher.from_array("teacher.npy")


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(258, 32), nn.ReLU(), nn.Linear(32, 16))


module = DistillationModule(
    student(), teacher=teacher, loss=RKD(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
)
trainer = L.Trainer(
    max_epochs=40,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
)
trainer.fit(module, DataLoader(train_set, batch_size=96, shuffle=True, drop_last=True))
print(f"loss after training: {trainer.callback_metrics['train/loss']:.4f}")

# %% [markdown]
# ## Neighbours of unseen products
#
# How often is the nearest other product of the same kind and material? Compared are the raw features, an untrained student and the
# teacher's embeddings of the same products.

# %%
table = torch.from_numpy(np.load("teacher.npy"))
held = torch.tensor(test_set.indices)
with torch.no_grad():
    compared = {
        "raw features (258)": x[held],
        "untrained student (16)": student()(x[held]),
        "student (16)": module.student(x[held]),
        "teacher (256)": table[held],
    }
for name, embeddings in compared.items():
    metric = EmbeddingRetrieval()
    metric.update(embeddings, y[held])
    scores = metric.compute()
    print(f"{name:24} recall@1 {scores['recall_at_1']:.3f}   MAP@R {scores['map_at_r']:.3f}")

# %% [markdown]
# The teacher's embedding has width 256, the student's 16.

# %%
# %matplotlib inline
from lightning_rkd import plots

figure = plots.relations(
    {"teacher": table[held], "raw features": x[held], "student": module.student(x[held]).detach()},
    y[held],
    [f"{material} {kind}" for kind in kinds for material in materials],
    title="Distances between products",
)
figure.set_dpi(60)
figure

# %% [markdown]
# ## Errors
#
# A table with a missing row or a NaN would match the wrong rows. It is refused:

# %%
try:
    L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    ).fit(
        DistillationModule(student(), teacher=CachedTeacher.from_array(table[:-1]), loss=RKD()),
        DataLoader(train_set, batch_size=96),
    )
except ValueError as error:
    print(error)

# %% [markdown]
# For rows with their own identifiers, use `CachedTeacher.from_array(table, ids=...)`; the batch then holds the identifiers.
#
# ## Next
#
# - [Cached teacher](../docs/cached_teacher.md): the same for a network, with `lightning-rkd cache`.
# - [02 Attach it to your own module](02_your_own_module.ipynb): the callback accepts the same teacher.
# - [Export](../docs/export.md) the student.
