# %% [markdown]
# # 10. MHGD in two stages
#
# Multi-head graph distillation (Lee and Song 2019, arXiv:1907.02226) models how features change *from one stage to the next*.
# Between two stages it learns a graph: for each image, how much every other image of the batch helps to predict its
# features. The student learns to reproduce the teacher's graphs.
#
# Training has two stages:
#
# 1. the graphs are learned from the teacher alone, without labels: `AttentionGraphEstimator`;
# 2. the student learns its task and the graphs: `MHGDModule`.
#
# Everything is small, so that it runs in about a minute; [the measured runs](../docs/mhgd_on_cifar100.md) are longer.

# %%
import logging
import warnings

import lightning as L
import torch
from torch import nn

from lightning_rkd import EmbeddingRetrieval
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.models import Classified, ConvNet

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a notebook needs fewer words
warnings.filterwarnings("ignore", module="lightning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}

data = GlyphDataModule(max_classes=60, image_size=20, classes_per_batch=24, samples_per_class=2, batches_per_epoch=30)
data.prepare_data()
data.setup("fit")
print(f"{len(data.train_set)} glyphs of {data.num_train_classes} classes to train with")

# %% [markdown]
# ## A teacher
#
# A classifier with three stages of feature maps; the student has as many stages, with fewer channels.

# %%
from lightning_rkd import DistillationModule

STAGES = ["backbone.backbone.stage1", "backbone.backbone.stage2", "backbone.backbone.stage3"]


def network(widths, depth):
    return Classified(ConvNet(widths, embedding_dim=32, depth=depth), num_classes=data.num_train_classes)


def settings(epochs):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * data.batches_per_epoch)

    return {
        "task_loss": nn.CrossEntropyLoss(),
        "task_reads": "logits",
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "lr_scheduler": schedule,
        "lr_interval": "step",
        "student_layer": {"embedding": "backbone", "logits": "classifier", "feature_maps": STAGES},
        "metrics": {"retrieval": EmbeddingRetrieval()},
    }


def train(module, epochs):
    trainer = L.Trainer(max_epochs=epochs, limit_val_batches=0, enable_checkpointing=False, accelerator="cpu", **QUIET)
    trainer.fit(module, data)
    return trainer


torch.manual_seed(0)
teacher = DistillationModule(network((12, 24, 48), depth=2), **settings(6))
_ = train(teacher, 6)

# %% [markdown]
# ## Stage 1: the teacher's graphs
#
# No labels and no student. The graph of two stages estimates the later one's singular vectors from the earlier one's, and is
# as good as that estimate. `val/cosine_error` is one minus the cosine between the two: of an untrained graph, then of the
# trained one.

# %%
from lightning_rkd.modules import AttentionGraphEstimator

torch.manual_seed(0)
estimator = AttentionGraphEstimator(teacher.student, STAGES, heads=4)
check = L.Trainer(accelerator="cpu", **QUIET)
before = check.validate(estimator, data, verbose=False)[0]["val/cosine_error"]
trainer = train(estimator, 4)
after = check.validate(estimator, data, verbose=False)[0]["val/cosine_error"]
trainer.save_checkpoint("graphs.ckpt")
print(f"error of the estimate: {before:.3f} untrained, {after:.3f} trained")

# %% [markdown]
# ## Stage 2: the student
#
# The loss `MHGD` reads the graphs from the checkpoint and freezes them: teacher and student are compared through the *same*
# graph heads. `MHGDModule` clips the distillation gradient of every parameter by the task's, as the authors do, so there is
# no weight to choose. In a short training the full bound costs accuracy, and `clip=0.1` pulls at a tenth of it.

# %%
from lightning_rkd.losses import MHGD
from lightning_rkd.modules import MHGDModule

torch.manual_seed(1)
student = MHGDModule(
    network((6, 12, 12), depth=1),
    teacher=teacher.student,
    teacher_layer={"embedding": "backbone", "logits": "classifier", "feature_maps": STAGES},
    loss=MHGD(estimator="graphs.ckpt", heads=4),
    **settings(6),
)
train(student, 6)

torch.manual_seed(1)
alone = DistillationModule(network((6, 12, 12), depth=1), **settings(6))
train(alone, 6)

scores = {
    name: L.Trainer(accelerator="cpu", **QUIET).test(module, data, verbose=False)[0]["test/recall_at_1"]
    for name, module in {"teacher": teacher, "student with MHGD": student, "student alone": alone}.items()
}
for name, score in scores.items():
    print(f"{name:20} recall@1 on unseen glyphs {score:.3f}")

# %% [markdown]
# ## Did it learn the graphs?
#
# The score of one short run with one seed says little. The aim of the method can be measured directly: the divergence
# of the student's graphs from the teacher's, on glyphs of classes that neither was trained on.

# %%
divergence = {}
images = torch.stack([data.val_set[row][0] for row in range(0, len(data.val_set), 3)][:48])
for name, module in {"student with MHGD": student, "student alone": alone}.items():
    maps = []
    for net in (module.student.eval(), teacher.student.eval()):
        seen = []
        hooks = [
            net.get_submodule(stage).register_forward_hook(lambda m, i, o, s=seen: s.append(o)) for stage in STAGES
        ]
        with torch.no_grad():
            net(images)
        for hook in hooks:
            hook.remove()
        maps.append(seen)
    measure = student.loss if name == "student with MHGD" else MHGD(estimator="graphs.ckpt", heads=4)
    with torch.no_grad():
        divergence[name] = float(measure(*maps))
for name, value in divergence.items():
    print(f"{name:20} divergence from the teacher's graphs {value:.4g}")

# %% [markdown]
# ## On the command line
#
# The same three runs are three recipes: `lightning-rkd fit --config glyphs_classifier_teacher`, then
# `glyphs_mhgd_estimator`, then `glyphs_mhgd_student`; on CIFAR-100 `cifar100_mhgd_teacher` and so on.
#
# ## Where next
#
# - [MHGD on CIFAR-100](../docs/mhgd_on_cifar100.md): measured with three seeds, and in a schedule that short it did not help.
# - [The gallery](../docs/losses.md#mhgd) has its equation, its paper and its relatives.
# - [04 Choose a loss](04_choose_a_loss.ipynb) compares losses fairly.
