"""Loops without a Trainer, in plain PyTorch, Fabric and Hugging Face: the loss written by hand."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.utils.types import Batch
from tests.harness import nets
from tests.harness.ranks import Ranks

STEPS, ROWS = 4, 16
RELATIONS = RKD(distance_weight=2, angle_weight=3)


class Student(nn.Module):
    """A classifier with a backbone to read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nets.Backbone(), nn.Linear(5, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x).relu())
        return out


def batches() -> list[tuple[Tensor, Tensor]]:
    data = nets.Rows(STEPS * ROWS)
    return list(zip(data.x.split(ROWS), data.y.split(ROWS), strict=True))


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], 0.1, momentum=0.9)


def by_hand(
    loss: Callable[[Tensor, Tensor], Tensor] = RELATIONS,
    optimizer: torch.optim.Optimizer | None = None,
    student: Student | None = None,
    parts: int = 1,
    mixed: Any = None,
) -> Student:
    """Train with the relational loss in the step, as one writes it without a library."""
    student, teacher = student or Student(), nets.teacher().eval()
    optimizer = optimizer or sgd(student)
    for x, y in batches():
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with mixed or nullcontext():
                embedding = student.backbone(part)
                task = F.cross_entropy(student.head(embedding.relu()).float(), labels)
                with torch.no_grad():
                    target = teacher(part)
            ((task + loss(embedding.float(), target.float())) / parts).backward()
        optimizer.step()
    return student


def distilled(
    loss: Any = RELATIONS,
    optimizer: torch.optim.Optimizer | None = None,
    student: Student | None = None,
    parts: int = 1,
    mixed: Any = None,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
) -> Student:
    """The same by a distiller."""
    student = student or Student()
    optimizer = optimizer or sgd(student)
    distiller = Distiller(nets.teacher(), loss, student_layer="backbone")
    with distiller.attached(student, "cpu"):
        model = wrap(student)
        for x, y in batches():
            optimizer.zero_grad()
            for part, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with mixed or nullcontext():
                    distiller.start()
                    task = F.cross_entropy(model(part).float(), labels)
                    terms = distiller.compute_terms(Batch(part, labels))
                ((task + sum(terms.values())) / parts).backward()
            optimizer.step()
    return student


# Plain PyTorch


@pytest.mark.scenario("loops", "plain PyTorch")
@pytest.mark.parametrize("parts", [1, 4], ids=["one batch", "accumulated"])
def test_a_plain_loop_is_the_loss_written_by_hand(parts: int) -> None:
    assert nets.gap(distilled(parts=parts), by_hand(parts=parts)) == 0.0
    assert nets.gap(distilled(parts=parts, loss=0.0 * RKD()), by_hand(parts=parts)) > 1e-3


@pytest.mark.scenario("loops", "plain PyTorch in mixed precision with a gradient scaler")
def test_a_plain_loop_in_mixed_precision_is_the_loss_by_hand() -> None:
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    assert nets.gap(distilled(mixed=mixed), by_hand(mixed=mixed)) == 0.0
    assert nets.gap(distilled(mixed=mixed), distilled()) > 1e-5


@pytest.mark.scenario("loops", "plain PyTorch, compiled student")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile's
def test_a_compiled_student_in_a_plain_loop_is_the_loss_by_hand() -> None:
    torch.compiler.reset()  # code compiled without hooks would be reused
    compiled = distilled(wrap=lambda module: torch.compile(module, backend="aot_eager"))
    assert nets.gap(compiled, by_hand()) <= 1e-6


@pytest.mark.scenario("loops", "plain PyTorch, a loss with parameters")
def test_parameters_of_a_loss_are_trained_by_the_loops_optimizer() -> None:
    trained = []
    for train in (distilled, by_hand):
        loss, student = nets.Projected(student_dim=5, teacher_dim=7), Student()
        train(loss, sgd(student, loss), student)
        trained.append((student, loss))
    assert [nets.gap(a, b) for a, b in zip(*trained, strict=True)] == [0.0, 0.0]
    assert nets.gap(trained[0][1], nets.Projected(student_dim=5, teacher_dim=7)) > 1e-3


def test_a_loss_whose_parameters_no_optimizer_can_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"before training begins: pass Projected\(student_dim=5, teacher_dim=7\)"):
        distilled(nets.Projected())  # was trained with a projection that stayed as it was initialised


def test_sizes_of_a_loss_can_come_from_the_first_batch() -> None:
    loss, student, (x, y) = nets.Projected(), Student(), batches()[0]
    distiller = Distiller(nets.teacher(), loss, student_layer="backbone")
    with distiller.attached(student, "cpu"):
        distiller.start()
        student(x)
        distiller.materialize(distiller.collect(Batch(x, y)))
        assert loss.project.weight.shape == (7, 5)
        distiller.start()
        student(x)
        assert distiller.compute_terms(Batch(x, y))["projected"] > 0


@pytest.mark.parametrize(("layer", "error"), [("backbone", CaptureError), ("bone", LayerNotFoundError)])
def test_nothing_stays_after_a_loop_that_fails(layer: str, error: type[Exception]) -> None:
    student, teacher = Student(), nets.teacher().train()
    with pytest.raises(error):
        run_teacher_only(Distiller(teacher, RKD(), student_layer=layer, input_layer=""), student)
    assert nets.attachments(student, teacher) == []
    assert teacher.training


def run_teacher_only(distiller: Distiller, student: nn.Module) -> None:
    with distiller.attached(student, "cpu"):
        distiller.start()
        distiller.compute_terms(Batch(torch.ones(2, nets.WIDTH)))


# Fabric


def with_fabric(rank: int | None, loss: Any = RELATIONS, parts: int = 1, shares: tuple[int, int] = (8, 8)) -> Student:
    """One process with whole batches, or one of two with its share of each."""
    student, loss = Student(), loss() if isinstance(loss, type) else loss
    if isinstance(loss, nn.Module):
        student.loss = loss  # so that DDP averages the gradients of its parameters
    optimizer = sgd(student)
    settings = {} if rank is None else {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    with mock.patch.dict(os.environ, {} if rank is None else {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}):
        fabric = Fabric(accelerator="cpu", **{"devices": 1, **settings})
        fabric.launch()
    model, optimizer = fabric.setup(student, optimizer)
    distiller = Distiller(nets.teacher(), loss, student_layer="backbone")
    with distiller.attached(student, fabric.device):
        for x, y in batches():
            optimizer.zero_grad()
            for number, (part, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                if rank is not None:
                    part, labels = part.split(shares)[rank], labels.split(shares)[rank]
                with fabric.no_backward_sync(model, enabled=number + 1 < parts):
                    distiller.start()
                    task = F.cross_entropy(model(part), labels)
                    if rank is not None:
                        task = task * 2 * len(part) / sum(shares)  # DDP averages over ranks
                    terms = distiller.compute_terms(Batch(part, labels))
                    fabric.backward((task + sum(terms.values())) / parts)
            optimizer.step()
    return student


class Projection(nets.Projected):
    def __init__(self) -> None:
        super().__init__(student_dim=5, teacher_dim=7)


@pytest.mark.scenario("loops", "Fabric")
def test_a_fabric_loop_is_the_loss_written_by_hand() -> None:
    trained, expected = with_fabric(None), by_hand()
    trained.loss = None
    assert nets.gap(trained, expected) == 0.0


@pytest.mark.scenario("loops", "Fabric on two ranks")
@pytest.mark.parametrize("loss", [RKD, nets.Hint, Projection])
def test_two_fabric_ranks_are_one_with_the_whole_batch(ranks: Ranks, loss: type) -> None:
    first, second = ranks.run(with_fabric, loss, 1, (11, 5))
    assert nets.gap(first, second) == 0.0
    assert nets.gap(first, with_fabric(None, loss)) <= 1e-6


@pytest.mark.scenario("loops", "Fabric on two ranks, accumulated batches")
def test_two_fabric_ranks_accumulate_batches_as_one_does(ranks: Ranks) -> None:
    first, second = ranks.run(with_fabric, RKD, 2, (4, 4))
    assert nets.gap(first, second) == 0.0
    assert nets.gap(first, with_fabric(None, RKD, 2)) <= 1e-6


def test_the_layer_of_a_wrapped_student_is_named_with_its_path() -> None:
    model = Fabric(accelerator="cpu", devices=1).setup_module(Student())
    with pytest.raises(LayerNotFoundError, match=r"no layer 'backbone'; near it: '_forward_module\.backbone'"):
        Distiller(nets.teacher(), RKD(), student_layer="backbone").attach(model)


# Hugging Face


def documented(name: str) -> Any:
    """A class of the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "loops.md").read_text(encoding="utf-8")
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"class {name}" in block)
    scope: dict[str, Any] = {"Batch": Batch}
    exec(source, scope)
    return scope[name]


def with_transformers(folder: Path, trainer: Callable[..., Any], **settings: Any) -> nn.Module:
    """Train a small text classifier."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    networks = []
    for width in (8, 16):
        torch.manual_seed(width)
        config = transformers.BertConfig(hidden_size=width, **small, **still)
        networks.append(transformers.BertForSequenceClassification(config))
    tokens = torch.randint(50, (32, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(tokens)]
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=2, learning_rate=0.01, save_strategy="no", report_to="none",
        eval_strategy="epoch", disable_tqdm=True, **settings,
    )  # fmt: skip
    student, teacher = networks
    trainer(student, teacher)(student, arguments, train_dataset=rows, eval_dataset=rows).train()
    assert nets.attachments(student, teacher) == []
    return student


def distilling(student: nn.Module, teacher: nn.Module) -> Callable[..., Any]:
    distiller = Distiller(teacher, RELATIONS, student_layer="bert.pooler", teacher_layer="bert.pooler")
    return partial(documented("DistillationTrainer"), distiller=distiller)


def written(student: nn.Module, teacher: nn.Module, relations: float = 1.0) -> Callable[..., Any]:
    """A Trainer whose step holds the loss."""
    import transformers

    class Trainer(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False  # cross_entropy is a mean

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs["labels"]
            embedding = model.bert(inputs["input_ids"]).pooler_output
            logits = model.classifier(embedding)
            loss = F.cross_entropy(logits, labels)
            if model.training:
                with torch.no_grad():
                    target = teacher.eval().bert(inputs["input_ids"]).pooler_output
                loss = loss + relations * RELATIONS(embedding, target)
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    return Trainer


@pytest.mark.scenario("loops", "Trainer of Hugging Face")
@pytest.mark.filterwarnings("ignore")  # of transformers and what it imports
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}])
def test_a_hugging_face_trainer_is_the_loss_written_by_hand(tmp_path: Path, settings: Any) -> None:
    trained, expected = (with_transformers(tmp_path, made, **settings) for made in (distilling, written))
    assert nets.gap(trained, expected) == 0.0
    assert nets.gap(trained, with_transformers(tmp_path, partial(written, relations=0.0), **settings)) > 1e-3


TORCHRUN = """
import os
from pathlib import Path
import torch
from tests.distillation.test_loops import SGD, distilling, with_transformers

student = with_transformers(Path("out"), distilling, per_device_train_batch_size=8, ddp_backend="gloo", **SGD)
if os.environ["RANK"] == "0":
    torch.save(student.state_dict(), "student.pt")
"""
SGD = {"optim": "sgd", "max_grad_norm": 0.0}


@pytest.mark.scenario("loops", "Trainer of Hugging Face on two ranks")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and what it imports
def test_two_ranks_of_a_hugging_face_trainer_are_one(tmp_path: Path) -> None:
    alone = with_transformers(tmp_path, distilling, per_device_train_batch_size=16, **SGD)
    (tmp_path / "train.py").write_text(TORCHRUN)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    both = torch.load(tmp_path / "student.pt", weights_only=True)
    assert max(float((both[name] - x).abs().max()) for name, x in alone.state_dict().items()) <= 1e-6
