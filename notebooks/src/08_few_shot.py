# %% [markdown]
# # 8. Few-shot: a prototype for every new class
#
# Few-shot classification recognises unseen classes from one or five examples of each. The mean of the examples is the class's
# *prototype*, and a query belongs to the nearest one (Snell, Swersky and Zemel 2017). Accuracy depends only on the geometry of the
# embedding, which RKD distils.
#
# This notebook covers episodes, the loss that trains on them, accuracy with a confidence interval, and a distilled student.

# %%
import logging
import warnings

import lightning as L
import torch

from lightning_rkd import RKD, DistillationModule
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.metrics import FewShotAccuracy
from lightning_rkd.models import ConvNet, PrototypicalLoss, count_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## Episodes
#
# A batch of 20 classes with 4 images each is a 20-way episode: the first image of each class is its prototype (1 shot), the other
# three are queries. Test classes are disjoint from training classes.

# %%
data = GlyphDataModule(image_size=20, max_classes=150, classes_per_batch=20, samples_per_class=4, batches_per_epoch=40)
data.prepare_data()
data.setup("fit")
images, labels = next(iter(data.train_dataloader()))
print(
    f"an episode: {tuple(images.shape)}, {len(labels.unique())} classes, {len(labels) // len(labels.unique())} of each"
)
print(f"classes to train with: {data.num_train_classes}")

# %% [markdown]
# ## Train on episodes
#
# `PrototypicalLoss` is the task loss. `FewShotAccuracy` draws many episodes from the embeddings of all test images; several can be
# evaluated at once.

# %%
EPOCHS = 6


def module(network, **distillation):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * data.batches_per_epoch)

    return DistillationModule(
        network,
        task_loss=PrototypicalLoss(shots=1),
        metrics={f"{shots}": FewShotAccuracy(ways=20, shots=shots, queries=5, episodes=400) for shots in (1, 5)},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=schedule,
        lr_interval="step",
        **distillation,
    )


def train(own):
    trainer = L.Trainer(
        max_epochs=EPOCHS, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(own, data)
    return trainer.test(own, data, verbose=False)[0]


def show(name, scores):
    parts = []
    for shots in (1, 5):
        key = f"test/few_shot_accuracy_20_way_{shots}_shot"
        parts.append(f"{shots}-shot {100 * scores[key]:5.1f} \N{PLUS-MINUS SIGN} {100 * scores[key + '_ci95']:.1f} %")
    print(f"{name:18} {'   '.join(parts)}")


torch.manual_seed(0)
teacher = module(ConvNet((16, 32, 64), embedding_dim=64))
show("teacher", train(teacher))

# %% [markdown]
# The interval covers the sampling of episodes, not of trainings.
#
# ## A small student
#
# Alone, and with RKD added to the prototypical loss. The weights 1 and 2 suit this short training; the paper uses 50 and 100, halved
# when combined, in a long one.

# %%
torch.manual_seed(1)
alone = train(module(ConvNet((6, 12), embedding_dim=32, depth=1)))
torch.manual_seed(1)
distilled = train(
    module(
        ConvNet((6, 12), embedding_dim=32, depth=1),
        teacher=teacher.student,
        loss=RKD(distance_weight=1, angle_weight=2),
    )
)
small = count_parameters(ConvNet((6, 12), embedding_dim=32, depth=1))
print(f"student: {small:,} parameters, teacher: {count_parameters(teacher.student):,}")
show("student alone", alone)
show("student with RKD", distilled)

# %% [markdown]
# A single run with one seed. [The results](../docs/results.md) have Omniglot with several seeds, 5 and 20 ways, 1 and 5 shots.
#
# ## New classes
#
# A trained student needs no further training for new classes. Take three unseen glyphs, one example each:

# %%
data.setup("test")
student = teacher.student.eval()
rows = torch.tensor(data.test_set.indices)
new = data.root.labels[rows].unique()[:3]
chosen = {int(label): rows[data.root.labels[rows] == label] for label in new}
with torch.no_grad():
    prototypes = student(torch.stack([data.root[int(own[0])][0] for own in chosen.values()]))
    hits = [
        int(torch.cdist(student(data.root[int(row)][0][None]), prototypes).argmin()) == number
        for number, own in enumerate(chosen.values())
        for row in own[1:]
    ]
print(f"{sum(hits)} of {len(hits)} images of {', '.join(data.class_names[int(label)] for label in new)} named right")

# %% [markdown]
# ## Next
#
# - The recipes `omniglot_conv4`, `omniglot_conv4_rkd` and `mini_imagenet_conv4_rkd` have the paper's settings.
# - [`episode_sampler`](../docs/data_sets.md) draws episodes from any labelled data set.
# - [07 Classification](07_classification.ipynb), if training and test classes are the same.
