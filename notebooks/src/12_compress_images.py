# %% [markdown]
# # 12. Compress a pretrained model on your own images, without labels
#
# You have a pretrained network that embeds images well and is too big for where it shall run, and a folder of your own images that
# nobody labelled. `lightning-rkd distill` makes of both a small network, exported and with its preprocessing, and a table of what it
# kept:
#
# ```
# lightning-rkd distill --teacher timm:vit_small_patch14_dinov2 --data photos --unlabelled
# ```
#
# This notebook downloads nothing. Its pretrained network is one that it trains in half a minute, and its photographs are drawn
# glyphs, but they are files in folders, as yours are.
#
# ## What comes in: a teacher
#
# Pretend that somebody else did this, on other images than yours: a network is trained with labels on 210 glyphs.

# %%
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import DistillationModule
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet

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
    return network


torch.save(pretrain().state_dict(), "teacher.pt")

# %% [markdown]
# The usual teacher needs no code: `torchvision:resnet50@DEFAULT`, `timm:NAME`, `hf:FOLDER`, `onnx:FILE`, or the rows of
# `embeddings:FILE.npy` ([all forms](../docs/distill.md)). A network of your own is a class or function in a file, here `networks.py`.
# Its attribute `transform` turns one image into the input that the teacher was trained with; the student has a preprocessing of its own.

# %%
_ = Path("networks.py").write_text(f"""\
import torch
from torchvision.transforms.functional import pil_to_tensor

from lightning_rkd.models import ConvNet


class Teacher(ConvNet):
    def __init__(self):
        super().__init__(depth=1)
        self.load_state_dict(torch.load("teacher.pt", weights_only=True))

    def transform(self, image):
        return (pil_to_tensor(image.convert("L")) / 255 - {data.root.mean.item():.3f}) / {data.root.std.item():.3f}


def student(embedding_dim):
    return ConvNet(widths=(8, 16, 32), depth=1, embedding_dim=embedding_dim, in_channels=3)
""")

# %% [markdown]
# ## What comes in: images
#
# `photos` holds the 2,520 images of 210 other glyphs, in one folder, without labels. `test` holds those of 105 further glyphs in a
# folder for each. It serves to measure, and you need none: a fifth of `photos` would be held out, and the table would have no recall.

# %%
from PIL import Image


def write(row, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.root.images[row, 0].numpy()).save(path)


for number, row in enumerate(data.val_set.indices):
    write(row, Path("photos", f"{number:04}.png"))
for number, row in enumerate(data.test_set.indices):
    write(row, Path("test", f"glyph-{data.root.labels[row]}", f"{number:04}.png"))
print(f"photos: {len(list(Path('photos').iterdir())):,} files, test: {len(list(Path('test').iterdir()))} folders")

# %% [markdown]
# ## One command
#
# Without `--student` the command would choose a small ResNet, without `--epochs` train longer, and without `--loss` it takes
# `3 * RKD + CSD`, with temperatures for images, as here. Images are as large as the median of the files, at most 64 pixels; a student
# from a file has to say so.

# %%
command = ["distill", "--teacher=python:networks:Teacher", "--student=python:networks:student", "--data=photos"]
command += ["--unlabelled", "--test-data=test", "--image-size=28", "--epochs=40", "--out=compressed"]
plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # notebooks set it
done = subprocess.run([sys.executable, "-m", "lightning_rkd.cli", *command], env=plain, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
print(*(line for line in done.stdout.splitlines() if line.startswith(("Data", "Student", "Training"))), sep="\n")

# %% [markdown]
# ## Read the table

# %%
from IPython.display import Markdown

Markdown("\n".join(line for line in Path("compressed/table.md").read_text().splitlines() if line.startswith("|")))

# %% [markdown]
# - **common neighbours**: of the ten test images nearest to an image, the share that teacher and student agree on. It needs no labels,
#   and is the first number to look at. At random it would be 10 of 1,259.
# - **rank correlation** of all distances: 1 if the student orders all pairs of images as the teacher does.
# - **recall@1**: the share of images whose nearest other image is of the same class, each network among its own rows. The student
#   never saw a label, and none of these glyphs.
# - **recall@1, teacher's gallery**: the student's row as the query, among the rows of the *teacher*. That is for galleries that the
#   big network has embedded and that shall stay: [notebook 13](13_search_the_teachers_gallery.ipynb).
# - **ms** for one image, with its preprocessing, on this machine.
#
# Too low? Train for longer, give more images of the kind that the student will see, or a larger student, in that order of effort:
# this one has a sixth of the teacher's parameters and was trained for half a minute.
#
# `compressed/report.html` has the table with pictures, such as these, from the embeddings of both networks in
# `held_out.safetensors`:

# %%
# %matplotlib inline
import numpy as np
from safetensors.torch import load_file
from torch.nn.functional import normalize

from lightning_rkd import plots

held = load_file("compressed/held_out.safetensors")
paths = sorted(Path("test").rglob("*.png"))
pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))[:, None]
figure = plots.neighbours(pixels, held["labels"], {name: normalize(held[name]) for name in ("teacher", "student")})
figure.set_dpi(60)
figure

# %% [markdown]
# ## Use the student
#
# The folder `student` is what you deploy:

# %%
print(
    *(f"{path.name:20} {path.stat().st_size:>9,} bytes" for path in sorted(Path("compressed/student").iterdir())),
    sep="\n",
)

# %% [markdown]
# With PyTorch, `export.load` gives a network that takes images as they are:

# %%
from lightning_rkd import export

student = export.load("compressed/student")
student([Image.open("photos/0000.png"), Image.open("photos/0001.png")]).shape

# %% [markdown]
# Without PyTorch and without this library, `use.py` in that folder needs numpy, Pillow and onnxruntime. The script below forbids the
# import of both, embeds the test images, and finds for each the nearest other one:

# %%
_ = Path("search.py").write_text("""\
import sys
from pathlib import Path

sys.modules["torch"] = sys.modules["lightning_rkd"] = None  # an import would fail
sys.path.insert(0, "compressed/student")

import numpy as np
from use import embed

paths = sorted(Path("test").rglob("*.png"))
x = embed(paths)
x /= np.linalg.norm(x, axis=1, keepdims=True)
cosines = x @ x.T
np.fill_diagonal(cosines, -1)
nearest = cosines.argmax(1)
print(f"{len(x):,} images embedded into {x.shape[1]} numbers each")
print(f"the nearest image to {paths[0].name} is {paths[nearest[0]].name}")
same = [paths[i].parent == paths[j].parent for i, j in enumerate(nearest)]
print(f"recall@1 {np.mean(same):.3f}")
""")
print(subprocess.run([sys.executable, "search.py"], check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# The recall is that of the table.
#
# ## Again
#
# The same command resumes where it was stopped, and does nothing where it is done: the teacher's embeddings, the training and the table
# are kept in `compressed`. Another teacher, loss or folder of images belongs into another `--out`.
#
# ## Next
#
# - [Compress the model you have](../docs/distill.md): all teachers, students, data and options.
# - [Which loss?](../docs/which_loss.md): what is known about the default, and when to leave it.
# - [13 A small student that searches the teacher's gallery](13_search_the_teachers_gallery.ipynb)
