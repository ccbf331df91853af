# %% [markdown]
# # 11. Text: intents that nobody labelled
#
# A bank sorts its customers' questions by intent. New intents appear every month, so questions are compared with answered ones:
# retrieval of an embedding. The teacher is WordLlama, a table of 32,000 token vectors taken from large language models (MIT licence).
# The student has 36,000 parameters, knows no tokens, and is evaluated on intents that it has never seen.
#
# ## The teacher
#
# `pip install wordllama` brings its table and tokenizer, 16 MB, so nothing is downloaded here.

# %%
import csv
import logging
import os
import re
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # keep the notebook short
warnings.filterwarnings("ignore", module="lightning")

if find_spec("wordllama") is None:
    raise ImportError("the teacher of this notebook is a package of its own: pip install wordllama")
folder = Path(find_spec("wordllama").origin).parent
tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
tokenizer.no_padding()
(table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
table = torch.cat([table.float(), torch.zeros(1, table.shape[1])])  # the last row is padding
print(f"{table.shape[0] - 1:,} tokens, {table.shape[1]} dimensions")

# %% [markdown]
# ## The data
#
# Banking77 (Casanueva et al. 2020, CC-BY-4.0) if the environment variable `BANKING77` names the folder with its `train.csv` and
# `test.csv`. Otherwise, without a download, sentences made of a few templates: they let the notebook run, and their figures mean
# nothing. The figures here are Banking77's.


# %%
def banking77(folder):
    for name in ("train.csv", "test.csv"):
        with Path(folder, name).open(encoding="utf-8", newline="") as file:
            yield from ((row["text"], row["category"]) for row in csv.DictReader(file))


def templates():
    actions = {"block": ["block", "freeze"], "find": ["find", "locate"], "order": ["order", "request"]}
    things = ["card", "PIN", "transfer", "statement", "refund", "cheque", "account", "cash", "limit", "fee"]
    frames = ["How do I {} my {}?", "I want to {} a {}", "please {} the {} today", "can I {} another {} abroad"]
    for action, words in actions.items():
        for thing in things:
            yield from ((frame.format(word, thing), f"{action} {thing}") for word in words for frame in frames * 3)


source = os.environ.get("BANKING77")
texts, names = zip(*(banking77(source) if source else templates()), strict=True)
intents = sorted(set(names))
y = torch.tensor([intents.index(name) for name in names])
order = torch.randperm(len(intents), generator=torch.Generator().manual_seed(1))
sizes = [30 * len(intents) // 77, 38 * len(intents) // 77]
parts = dict(zip(("training", "validation", "test"), order.tensor_split(sizes), strict=True))
print(f"{'Banking77' if source else 'templates'}: {len(texts):,} texts, such as {texts[0]!r}")
print(", ".join(f"{len(part)} intents for {name}" for name, part in parts.items()))

# %% [markdown]
# ## Two tokenizers
#
# Teacher and student read a text in their own ways: the teacher in tokens, the student in words and pieces of four characters, each
# hashed to one of 2,048 rows. A batch holds both, and `teacher_inputs=` names the teacher's. Further forms: [Batches](../docs/batches.md).

# %%
from torch.utils.data import DataLoader, Dataset

from lightning_rkd.data import PKBatchSampler

ROWS = 2048  # of the student's table; row 0 is padding


def pieces(text):
    words = re.findall(r"[a-z0-9]+", text.lower())
    parts = words + [f"<{word}>"[i : i + 4] for word in words for i in range(len(word) - 1)]
    return torch.tensor([1 + zlib.crc32(part.encode()) % (ROWS - 1) for part in parts])


class Texts(Dataset):
    def __init__(self, part):
        rows = torch.isin(y, parts[part]).nonzero().flatten().tolist()
        self.labels = y[rows]
        self.pieces = [pieces(texts[row]) for row in rows]
        self.tokens = [torch.tensor(tokenizer.encode(texts[row], add_special_tokens=False).ids) for row in rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.pieces[row], self.tokens[row], self.labels[row]


def collate(samples):
    parts, tokens, labels = zip(*samples, strict=True)
    return {
        "student": pad_sequence(parts, batch_first=True),
        "teacher": pad_sequence(tokens, batch_first=True, padding_value=len(table) - 1),
        "intent": torch.stack(labels),
    }


train_set = Texts("training")
loaders = {part: DataLoader(Texts(part), batch_size=500, collate_fn=collate) for part in ("validation", "test")}
{name: tuple(x.shape) for name, x in collate([train_set[0], train_set[1]]).items()}

# %% [markdown]
# ## The networks
#
# The teacher is the mean of its tokens' vectors, with unit norm. The student is alike, with a small table and two layers behind it.

# %%
from lightning_rkd.models import L2Normalize, count_parameters

teacher = nn.Sequential(nn.EmbeddingBag.from_pretrained(table, mode="mean", padding_idx=len(table) - 1), L2Normalize())


def student():
    bag = nn.EmbeddingBag(ROWS, 16, mode="mean", padding_idx=0)
    return nn.Sequential(bag, nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))


print(f"student: {count_parameters(student()):,} parameters, teacher: {table.numel():,}")

# %% [markdown]
# ## Alone, and distilled
#
# A batch is 24 intents with five texts each. The triplet loss needs their labels, RKD does not.

# %%
from pytorch_metric_learning.losses import TripletMarginLoss

from lightning_rkd import RKD, DistillationModule
from lightning_rkd.metrics import EmbeddingRetrieval

keys = {"inputs": "student", "teacher_inputs": "teacher", "labels": "intent"}
quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)


def train(seed, part, steps=500, **distillation):
    torch.manual_seed(seed)
    module = DistillationModule(
        student(),
        metrics={"retrieval": EmbeddingRetrieval()},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps),
        lr_interval="step",
        **keys,
        **distillation,
    )
    batches = PKBatchSampler(train_set.labels, min(24, len(parts["training"])), 5, seed=seed, batches_per_epoch=steps)
    trainer = L.Trainer(max_epochs=1, limit_val_batches=0, accelerator="cpu", **quiet)
    trainer.fit(module, DataLoader(train_set, batch_sampler=batches, collate_fn=collate))
    return trainer.test(module, loaders[part], verbose=False)[0]


triplet = {"task_loss": TripletMarginLoss(margin=0.2)}
rkd = {"teacher": teacher, "loss": RKD()}
validation = {}
for weight in (1, 10, 100):
    validation[weight] = train(0, "validation", weight=weight, **triplet, **rkd)["test/recall_at_1"]
    print(f"weight of RKD {weight:3}: recall@1 on the validation intents {validation[weight]:.3f}")
weight = max(validation, key=validation.get)

# %% [markdown]
# With the best of these weights, on the test intents, the mean of two seeds:

# %%
ways = {"triplet alone": triplet, "triplet + RKD": {"weight": weight, **triplet, **rkd}, "RKD alone": rkd}
for name, way in ways.items():
    runs = [train(seed, "test", **way) for seed in (0, 1)]
    recall, precision = (sum(run[f"test/{key}"] for run in runs) / len(runs) for key in ("recall_at_1", "map_at_r"))
    print(f"{name:14} recall@1 {recall:.3f}, MAP@R {precision:.3f}")


# %% [markdown]
# The teacher itself on the same texts:

# %%
metric = EmbeddingRetrieval()
for batch in loaders["test"]:
    metric.update(teacher(batch["teacher"]), batch["intent"])
best = metric.compute()
print(f"{'teacher':14} recall@1 {best['recall_at_1']:.3f}, MAP@R {best['map_at_r']:.3f}")

# %% [markdown]
# RKD compares distances between the rows of one network, so the student's space is not the teacher's: queries of the student search
# a gallery of the student. The student learns from the teacher's relations among the *training* intents alone, and keeps part of what
# they say about others. More texts without labels would serve as well, since RKD needs none.
#
# ## Next
#
# - [Batches](../docs/batches.md): every form that `inputs=`, `teacher_inputs=`, `labels=` and `indices=` take.
# - [Export](../docs/export.md): text encoders in `torch.export` and ONNX, for texts of any length.
# - [09 Embeddings without their network](09_embeddings_only.ipynb): the teacher's rows as a table.
