# %% [markdown]
# # 3. What relations are
#
# Relational distillation matches relations between samples instead of outputs. This notebook shows
#
# - distances and angles of three points, and of ten;
# - which transformations a relational loss ignores;
# - matrices of distances and angles of real networks, before and after distillation.

# %% [markdown]
# ## Distances and angles
#
# Ten points in the plane are a teacher's embedding of ten samples. One student has the same shape, moved, rotated and scaled.
# The other is distorted.

# %%
import matplotlib.pyplot as plt
import torch

from lightning_rkd import RKD, RKDAngle, RKDDistance

torch.manual_seed(0)
t = torch.linspace(0, 5.2, 10)
teacher = torch.stack([t.cos(), t.sin()], dim=1) * torch.linspace(0.4, 1.5, 10)[:, None]  # a spiral

angle = torch.tensor(0.9)
turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
spaces = {
    "teacher": teacher,
    "same shape, elsewhere": 0.5 * teacher @ turn + torch.tensor([1.0, -0.5]),
    "squeezed": teacher * torch.tensor([1.0, 0.25]),
}


def draw(points, axis, title):
    axis.plot(*points.T, color="#bbbbbb", zorder=1)
    axis.scatter(*points.T, c=range(len(points)), cmap="viridis", s=60, zorder=2)
    axis.plot(*points[[0, 6, 9]].T, color="#d55e00", linestyle="--", zorder=1)  # the legs of one angle
    axis.set(title=title, aspect="equal", xlim=(-2, 2), ylim=(-2, 2))


figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", dpi=58)
for (name, points), axis in zip(spaces.items(), axes, strict=True):
    draw(points, axis, name)
plt.show()

# %% [markdown]
# One distance, and the orange angle at its middle point, in the three spaces:

# %%
for name, x in spaces.items():
    distances = torch.pdist(x)
    legs = torch.nn.functional.normalize(x[[0, 9]] - x[6], dim=1)
    degrees = torch.rad2deg(torch.acos(legs[0] @ legs[1]))
    one = (x[0] - x[9]).norm()
    print(
        f"{name:22} distance {one:.2f} = {one / distances.mean():.2f} x the mean distance   angle {degrees:.0f} degrees"
    )

# %% [markdown]
# Distances are divided by their mean, so scale does not matter; angles are independent of it. The losses compare all pairs and
# all triplets:

# %%
for name, points in spaces.items():
    d, a = RKDDistance()(points, teacher), RKDAngle()(points, teacher)
    print(f"{name:22} distance loss {d:.4f}   angle loss {a:.4f}")

# %% [markdown]
# ## Training with relations only
#
# Ten random points, moved along the gradient of the loss:

# %%
student = torch.randn(10, 2).requires_grad_()
start = student.detach().clone()
optimizer = torch.optim.Adam([student], lr=0.05)
loss = RKD()
for _ in range(300):
    optimizer.zero_grad()
    value = loss(student, teacher)
    value.backward()
    optimizer.step()

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", dpi=58)
draw(teacher, axes[0], "teacher")
draw(start, axes[1], f"student before, loss {loss(start, teacher):.3f}")
draw(student.detach(), axes[2], f"student after, loss {value.item():.3f}")
plt.show()

# %% [markdown]
# The shape is the teacher's. Position, orientation and reflection are free.
#
# ## Networks
#
# Now the points are embeddings of images. The teacher is trained on labels. The student gets no labels, only the relations in
# batches of 120 images.

# %%
import logging
import warnings

import lightning as L
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import DistillationModule
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

data = GlyphDataModule(max_classes=200)


def train(student, steps, learning_rate, **how):
    module = DistillationModule(
        student,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps),
        lr_interval="step",
        **how,
    )
    trainer = L.Trainer(max_steps=steps, use_distributed_sampler=False, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)


torch.manual_seed(0)
teacher = ConvNet(widths=(16, 32, 64), depth=1, embedding_dim=64, normalize=True)
train(teacher, steps=200, learning_rate=1e-2, task_loss=TripletMarginLoss(margin=0.2))

# %%
images = torch.stack([x for x, _ in data.test_set])
labels = torch.tensor([y for _, y in data.test_set])
print(f"{len(images)} images of {len(labels.unique())} unseen classes")


@torch.no_grad()
def embed(network):
    return network.eval()(images)


torch.manual_seed(1)
student = ConvNet(widths=(8, 16, 16), depth=1, embedding_dim=32)
embeddings = {"teacher": embed(teacher), "student before": embed(student)}
train(student.train(), steps=200, learning_rate=3e-2, teacher=teacher, loss=RKD())
embeddings["student after"] = embed(student)

# %% [markdown]
# ### Distances
#
# Rows and columns are images; dark is near. The blocks on the diagonal are images of one class.

# %%
from lightning_rkd import plots

figure = plots.relations(embeddings, labels, class_names=data.class_names)
figure.set_dpi(50)
figure

# %% [markdown]
# ### Distances and angles, one by one
#
# Each dot is a pair of images (left) or a triplet (right): the teacher's value and the student's. On the diagonal they agree.

# %%
from lightning_rkd.metrics.agreement import angles, draw_triplets

pairs = torch.randint(len(images), (2, 3000), generator=torch.Generator().manual_seed(0))
triplets = draw_triplets(len(images), 3000, torch.Generator().manual_seed(0))


def measure(x):
    distance = (x[pairs[0]] - x[pairs[1]]).norm(dim=1)
    return distance / distance.mean(), angles(*x[triplets])


figure, axes = plt.subplots(2, 2, figsize=(8, 7.4), layout="constrained", dpi=58)
for row, name in zip(axes, ("student before", "student after"), strict=True):
    kinds = zip(
        measure(embeddings["teacher"]), measure(embeddings[name]), ("distance", "angle"), (2.5, 180), strict=True
    )
    for axis, (wanted, found, kind, top) in zip(row, kinds, strict=True):
        axis.hexbin(wanted, found, gridsize=40, extent=(0, top, 0, top), cmap="viridis", mincnt=1)
        axis.plot([0, top], [0, top], color="#d55e00", linewidth=1)
        axis.set(title=f"{name}: {kind}s", xlabel=f"teacher's {kind}", ylabel=f"student's {kind}", aspect="equal")
plt.show()

# %% [markdown]
# The same over all of them. Higher is better for overlap and correlation, lower for the gap:

# %%
from lightning_rkd import RelationalAgreement

for name in ("student before", "student after"):
    agreement = RelationalAgreement()
    agreement.update(embeddings[name], embeddings["teacher"])
    found = {key: round(value.item(), 3) for key, value in agreement.compute().items()}
    print(f"{name:15}", found)

# %% [markdown]
# Retrieval: how often is the nearest other image of the same class? The student was trained without labels.

# %%
from lightning_rkd import EmbeddingRetrieval

for name, x in embeddings.items():
    retrieval = EmbeddingRetrieval()
    retrieval.update(x, labels)
    print(f"{name:15} recall@1 {retrieval.compute()['recall_at_1']:.3f}")

# %% [markdown]
# ## Next
#
# - [04 Choose a loss](04_choose_a_loss.ipynb): other relations than distances and angles.
# - [05 Write your own loss](05_write_your_own_loss.ipynb).
# - [The gallery](../docs/losses.md) has the equations.
