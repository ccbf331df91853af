# %% [markdown]
# # 6. Many devices, mixed precision, resume
#
# This notebook checks three properties:
#
# - over several devices, relations span the rows of *all* of them;
# - in half precision, losses are computed in full precision;
# - an interrupted run resumes to the same weights, bit for bit.
#
# Everything runs on a CPU. The devices are two processes; on GPUs only `accelerator="gpu"` changes.

# %%
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## Two devices
#
# The script trains one student with the same 32 rows per step: all on one device, or 16 on each of two. It prints the trained
# weights.

# %%
_ = Path("train.py").write_text("""
import logging
import os
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_rkd import RKD, DistillationModule

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
devices = int(sys.argv[1])
torch.manual_seed(0)
student, teacher = nn.Linear(8, 4), nn.Linear(8, 16)
module = DistillationModule(student, teacher=teacher, loss=RKD(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
rows, rank = TensorDataset(torch.randn(96, 8)), int(os.environ.get("LOCAL_RANK", 0))
sampler = DistributedSampler(rows, devices, rank, shuffle=False)  # Lightning's would draw different batches
data = DataLoader(rows, batch_size=32 // devices, sampler=sampler)
trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False,
    strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    torch.save(student.state_dict(), f"on_{devices}.pt")
""")

import subprocess
import sys

for devices in (1, 2):
    done = subprocess.run([sys.executable, "train.py", str(devices)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

one, two = torch.load("on_1.pt"), torch.load("on_2.pt")
gap = max(float((one[name] - two[name]).abs().max()) for name in one)
print(f"largest difference of a weight after 6 steps: {gap:.1e}")

# %% [markdown]
# They differ by rounding only. Each device holds 16 rows, but every step used the relations of all 32: 32 x 32 distances, not two
# times 16 x 16. A loss computed on the rows of each device would lose relations with every additional device.
#
# Devices must receive different rows. Lightning adds a distributed sampler to your loader (disabled in the script to compare the
# same batches); for batches of classes use [`PKBatchSampler`](../docs/many_devices.md).

# %% [markdown]
# ## Mixed precision
#
# Under autocast the networks compute in bfloat16 or float16. The losses convert their inputs to float32, and distances to float64
# where needed. Compare embeddings far from the origin with the exact value:

# %%
from lightning_rkd import RKDDistance

torch.manual_seed(0)
student, teacher = torch.randn(64, 32) + 100, torch.randn(64, 128)


def by_hand(x, t):
    """The usual formula, in the precision of its inputs."""

    def relative(y):
        squares = (y * y).sum(1)
        d = (squares[:, None] + squares[None] - 2 * y @ y.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(y), dtype=y.dtype))
        return d / d[d > 0].mean()

    return nn.functional.smooth_l1_loss(relative(x), relative(t))


exact = by_hand(student.double(), teacher.double())
half = student.bfloat16().float()  # the output of a network in bfloat16
print(f"exact                {exact:.6f}")
print(f"here                 {RKDDistance()(student, teacher):.6f}")
print(f"by hand, float32     {by_hand(student, teacher):.6f}")
print(f"by hand, bfloat16    {by_hand(student.bfloat16(), teacher.bfloat16()):.6f}")

# %% [markdown]
# Therefore `precision="bf16-mixed"`, or `"16-mixed"` on a GPU, needs no further settings:

# %%
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, DistillationModule

data = DataLoader(TensorDataset(torch.randn(128, 8)), batch_size=32)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
module = DistillationModule(nn.Linear(8, 4), teacher=nn.Linear(8, 16), loss=RKD())
trainer = L.Trainer(max_epochs=3, precision="bf16-mixed", enable_checkpointing=False, **QUIET)
trainer.fit(module, data)
print(f"loss after 3 epochs in bf16-mixed: {trainer.callback_metrics['train/loss']:.4f}")

# %% [markdown]
# ## Stop and resume
#
# A checkpoint holds the student and the state of its training, not the teacher. Here a run is stopped after two of four epochs,
# resumed, and compared with an uninterrupted one. The data module's order and augmentation depend on seed and epoch only.

# %%
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet


def parts():
    data = GlyphDataModule(
        max_classes=20, image_size=16, classes_per_batch=6, samples_per_class=4, batches_per_epoch=8, seed=3
    )
    torch.manual_seed(3)
    teacher = ConvNet((8, 16), embedding_dim=32)
    return DistillationModule(ConvNet((4, 8), embedding_dim=8), teacher=teacher, loss=RKD()), data


def trainer(epochs):
    return L.Trainer(
        max_epochs=epochs, limit_val_batches=0, enable_checkpointing=False, use_distributed_sampler=False, **QUIET
    )


whole, data = parts()
trainer(4).fit(whole, data)

first, data = parts()
half_way = trainer(2)
half_way.fit(first, data)
half_way.save_checkpoint("half.ckpt")

resumed, data = parts()
trainer(4).fit(resumed, data, ckpt_path="half.ckpt")

same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
kept = sorted({name.split(".")[0] for name in torch.load("half.ckpt", weights_only=True)["state_dict"]})
print(f"the same weights, bit for bit: {same}")
print(f"in the checkpoint's state dict: {kept}")

# %% [markdown]
# Limit runs by epochs: Lightning 2.6 trains one batch too many when a run limited by `max_steps` resumes. On the command line, use
# `lightning-rkd fit --config ... --ckpt_path last`.
#
# ## Next
#
# - [Many devices and machines](../docs/many_devices.md): torchrun, SLURM, what is gathered.
# - [Guarantees](../docs/guarantees.md), with their tests.
# - [Faults](../docs/faults.md): killed runs, damaged files, failing ranks.
