# %% [markdown]
# # 6. Many devices, mixed precision, resume
#
# Three things that go wrong in silence elsewhere, and how to see that they are right here:
#
# - over several devices, relations span the rows of *all* of them;
# - in half precision, losses are computed in full;
# - a run that was stopped goes on to the same weights, bit for bit.
#
# All of it runs on a CPU. Several devices are two processes here; on GPUs nothing changes but `accelerator="gpu"`.

# %%
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a notebook needs fewer words
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## Two devices
#
# A script that trains one student, on as many devices as it is told, with the same 32 rows in every step: all on one device, or
# 16 on each of two. It prints what the weights have become.

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
sampler = DistributedSampler(rows, devices, rank, shuffle=False)  # Lightning's own would draw other batches
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
# Rounding only. Each device has 16 rows, but every step had the relations of all 32: 32 x 32 distances, not two times 16 x 16.
# With the usual way to compute such a loss under DDP, each device would have seen its own rows only, and the more devices there
# are the less would be left of the method.
#
# Batches must hold different rows on each device. Lightning puts a sampler of its own over your loader that sees to it (the script
# does without, to compare the same batches), and where classes are drawn [`PKBatchSampler`](../docs/many_devices.md) does.

# %% [markdown]
# ## Mixed precision
#
# Under autocast the networks compute in bfloat16 or float16. The losses do not: whatever comes in, they go to float32, and
# distances to float64 where it matters. To see why, take embeddings far from the origin and compare with the exact value:

# %%
from lightning_rkd import RKDDistance

torch.manual_seed(0)
student, teacher = torch.randn(64, 32) + 100, torch.randn(64, 128)


def by_hand(x, t):
    """The usual formula, in whatever precision its inputs have."""

    def relative(y):
        squares = (y * y).sum(1)
        d = (squares[:, None] + squares[None] - 2 * y @ y.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(y), dtype=y.dtype))
        return d / d[d > 0].mean()

    return nn.functional.smooth_l1_loss(relative(x), relative(t))


exact = by_hand(student.double(), teacher.double())
half = student.bfloat16().float()  # what a network in bfloat16 would show
print(f"exact                {exact:.6f}")
print(f"here                 {RKDDistance()(student, teacher):.6f}")
print(f"by hand, float32     {by_hand(student, teacher):.6f}")
print(f"by hand, bfloat16    {by_hand(student.bfloat16(), teacher.bfloat16()):.6f}")

# %% [markdown]
# So `precision="bf16-mixed"`, or `"16-mixed"` on a GPU, is all there is to say:

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
# ## Stop and go on
#
# A checkpoint holds the student, and what its training needs to go on; the teacher is not in it, because it is where you have
# it. Here a run is cut off after two of four epochs and resumed, and compared with one that ran through. The data module's
# order and distortions depend on seed and epoch alone, so that the third epoch is the same third epoch.

# %%
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import ConvNet


def parts():
    letters = GlyphDataModule(
        max_classes=20, image_size=16, classes_per_batch=6, samples_per_class=4, batches_per_epoch=8, seed=3
    )
    torch.manual_seed(3)
    teacher = ConvNet((8, 16), embedding_dim=32)
    return DistillationModule(ConvNet((4, 8), embedding_dim=8), teacher=teacher, loss=RKD()), letters


def trainer(epochs):
    return L.Trainer(
        max_epochs=epochs, limit_val_batches=0, enable_checkpointing=False, use_distributed_sampler=False, **QUIET
    )


whole, letters = parts()
trainer(4).fit(whole, letters)

first, letters = parts()
half_way = trainer(2)
half_way.fit(first, letters)
half_way.save_checkpoint("half.ckpt")

resumed, letters = parts()
trainer(4).fit(resumed, letters, ckpt_path="half.ckpt")

same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
kept = sorted({name.split(".")[0] for name in torch.load("half.ckpt", weights_only=True)["state_dict"]})
print(f"the same weights, bit for bit: {same}")
print(f"in the checkpoint's state dict: {kept}")

# %% [markdown]
# Give the length of a run in epochs: Lightning 2.6 trains one batch too many when a run that is limited by `max_steps` resumes.
# On the command line it is `lightning-rkd fit --config ... --ckpt_path last`.
#
# ## Where next
#
# - [Many devices and machines](../docs/many_devices.md): torchrun, SLURM, what is gathered and what is not.
# - [What is guaranteed](../docs/guarantees.md), with the test behind every promise.
# - [Kills and damage](../docs/faults.md): what was done to runs, and what became of them.
