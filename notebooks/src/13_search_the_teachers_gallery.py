# %% [markdown]
# # 13. A small student that searches the teacher's gallery
#
# A big network has embedded the catalogue, millions of pictures, and that index shall stay. The queries come from a phone, where only
# a small network runs. So the student's rows are compared with the *teacher's* rows. That takes more than a student that is good
# by itself, and the choice of the loss decides whether it works at all.
#
# ## The teacher and its gallery
#
# The teacher is trained on 210 glyphs. The catalogue are 105 other glyphs in eight faces each. All that is left of it are files: an array
# with the teacher's rows, and what each row is.

# %%
import logging
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning.losses import TripletMarginLoss
from torchvision.transforms.functional import pil_to_tensor

from lightning_rkd import DistillationModule
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet, count_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")
quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)

data = GlyphDataModule(max_classes=525, validation=0.4, test=0.2)
data.setup()


def pretrain(steps=300):
    torch.manual_seed(0)
    network = ConvNet(depth=1)
    module = DistillationModule(
        network,
        task_loss=TripletMarginLoss(margin=0.2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps),
        lr_interval="step",
    )
    trainer = L.Trainer(max_steps=steps, use_distributed_sampler=False, limit_val_batches=0, accelerator="cpu", **quiet)
    trainer.fit(module, data)
    return network.eval()


teacher = pretrain()
teacher.transform = lambda image: (pil_to_tensor(image.convert("L")) / 255 - data.root.mean) / data.root.std

# %%
pictures = [Image.fromarray(x[0].numpy()) for x in data.root.images]
rows = torch.tensor(data.test_set.indices)
labels = data.root.labels[rows]
is_query = torch.arange(len(rows)) % 12 >= 8  # a glyph is drawn in 12 faces
queries, query_labels = [pictures[row] for row in rows[is_query]], labels[is_query]

with torch.no_grad():
    gallery = teacher(torch.stack([teacher.transform(pictures[row]) for row in rows[~is_query]]))
np.save("gallery.npy", gallery.numpy())
np.save("labels.npy", labels[~is_query].numpy())
print(f"gallery.npy: {len(gallery)} rows of {gallery.shape[1]} numbers; {len(queries)} queries")

# %% [markdown]
# ## Three students
#
# They have the same architecture, initial weights, pictures and number of steps; only the loss differs. The pictures are the remaining
# 2,520, without labels. `distill` is the command of [notebook 12](12_compress_images.ipynb) as a function.

# %%
from lightning_rkd import distill

photos = [pictures[row] for row in data.val_set.indices]
losses = {
    "RKD": "RKD",
    "CSD": "CSD(student_temperature=0.05, teacher_temperature=0.05)",
    "3 * RKD + CSD": "3 * RKD + CSD(student_temperature=0.05, teacher_temperature=0.05)",  # the default for images
}
students = {}
for number, (name, loss) in enumerate(losses.items()):
    torch.manual_seed(0)
    network = ConvNet(widths=(8, 16, 32), depth=1, embedding_dim=128, in_channels=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = distill(teacher, network, photos, loss=loss, image_size=28, epochs=35, out=f"student-{number}")
    students[name] = done.student
    print(f"{name}: {count_parameters(network):,} parameters")
    for one in caught:
        if "align" in str(one.message):
            print("  warning:", one.message)

# %% [markdown]
# ## In its own gallery, and in the teacher's
#
# Twice the same queries: once the student embeds the catalogue anew, and once it searches `gallery.npy`. `StoredGallery` reads arrays
# in memory or from files. Its `ids` say which rows are samples of the evaluated data set, so that a query does not find itself; here
# the catalogue holds other pictures, so they are negative.

# %%
from lightning_rkd import EmbeddingRetrieval
from lightning_rkd.metrics import AsymmetricRetrieval, StoredGallery

stored = StoredGallery("gallery.npy", ids=[-1] * len(gallery), labels="labels.npy")


def recall_own(embed):
    metric = EmbeddingRetrieval(distance="cosine")
    metric.update(embed([pictures[row] for row in rows]), labels, is_query=is_query)
    return metric.compute()["recall_at_1"].item()


def recall_stored(query_rows, gallery=stored):
    metric = AsymmetricRetrieval(gallery=gallery)
    metric.update(query_rows, query_labels)
    return metric.compute()["asymmetric/recall_at_1"].item()


def embed_by_teacher(images):
    with torch.no_grad():
        return teacher(torch.stack([teacher.transform(image) for image in images]))


print(f"{'recall@1':14} {'own gallery':>12} {'gallery.npy':>12}")
for name, embed in {"teacher": embed_by_teacher, **students}.items():
    print(f"{name:14} {recall_own(embed):12.3f} {recall_stored(embed(queries)):12.3f}")
print(f"{'at random':14} {1 / len(labels.unique()):12.3f} {1 / len(labels.unique()):12.3f}")

# %% [markdown]
# `RKD` compares distances and angles *within* each network. They stay the same if the student's space is turned, shifted or scaled, so
# nothing makes its axes the teacher's. Among its own rows that costs nothing; among the teacher's its queries find what chance finds.
# `CSD` compares the student's rows with the teacher's, and its student can search there. Where the gallery can be embedded anew, that is
# still better. With one seed and 420 queries, differences of a few hundredths mean nothing.
#
# The picture has the queries of eight glyphs as each student embeds them (crosses), and the teacher's rows of the same glyphs (dots), in the
# plane of the teacher's two main axes. Those of `RKD` lie together, away from every glyph:

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
from torch.nn.functional import normalize

centre = normalize(gallery).mean(0)
axes = torch.linalg.svd(normalize(gallery) - centre, full_matrices=False).Vh[:2].T
few = query_labels.unique()[::13][:8]
figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharex=True, sharey=True, layout="constrained", dpi=70)
for panel, name in zip(panels, ("RKD", "3 * RKD + CSD"), strict=True):
    crosses = (normalize(students[name](queries)) - centre) @ axes
    dots = (normalize(gallery) - centre) @ axes
    for number, label in enumerate(few):
        panel.scatter(*dots[labels[~is_query] == label].T, s=14, color=f"C{number}")
        panel.scatter(*crosses[query_labels == label].T, s=60, marker="x", color=f"C{number}")
    panel.set_title(name)

# %% [markdown]
# ## Another width
#
# A student that is narrower than the teacher (`embedding_dim=32`) keeps a space of its own, and the loss trains a projection to the
# teacher's along: `student` and `projected` are both exported. For loops of your own, `loss.project(rows)` maps the queries, and
# `RetrievalEvaluation("backbone", gallery=stored)` or `DistillationModule(..., gallery=stored)` does so in each validation
# ([metrics](../docs/metrics.md)).
#
# ## An index of faiss
#
# A gallery that is an index of faiss is read by its path, here one of inner products over unit rows:

# %%
if find_spec("faiss"):
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(normalize(gallery).numpy())
    faiss.write_index(index, "gallery.faiss")
    indexed = StoredGallery("gallery.faiss", ids=[-1] * len(gallery), labels="labels.npy")
    print(f"recall@1 in the index: {recall_stored(students['3 * RKD + CSD'](queries), indexed):.3f}")
else:
    print("pip install 'lightning-rkd[faiss]'")

# %% [markdown]
# ## On the phone: numpy and onnxruntime alone
#
# The script forbids the import of PyTorch and of this library, embeds the queries with the exported student, and searches
# `gallery.npy`:

# %%
np.save("queries.npy", np.stack([np.asarray(image) for image in queries]))
np.save("query_labels.npy", query_labels.numpy())
_ = Path("search.py").write_text("""\
import sys

sys.modules["torch"] = sys.modules["lightning_rkd"] = None  # an import would fail
sys.path.insert(0, "student-2/student")

import numpy as np
from use import embed

gallery, labels = np.load("gallery.npy"), np.load("labels.npy")
gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
nearest = (embed(np.load("queries.npy")) @ gallery.T).argmax(1)  # the length of a query does not matter
print(f"recall@1 {np.mean(labels[nearest] == np.load('query_labels.npy')):.3f}")
""")
print(subprocess.run([sys.executable, "search.py"], check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# ## Next
#
# - [Which loss?](../docs/which_loss.md): when relations are enough, and when they are not. The column "aligns" of
#   [the losses](../docs/losses.md) says which ones bring the student into the teacher's space.
# - [Metrics](../docs/metrics.md): galleries in training, on many devices, and as files.
# - [Compress the model you have](../docs/distill.md)
