"""Tiny networks, losses and data, and how to compare them; without Lightning, so that ranks start fast."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.parts.state import StepState

WIDTH, CLASSES = 6, 3


class Gram(RelationalLoss):
    """Relates samples: mean squared difference of the two matrices of inner products."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student @ student.T, teacher @ teacher.T)


class Hint(RelationalLoss):
    """A mean over samples: every rank keeps its own rows."""

    gather = False

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.sum(1) - teacher.sum(1)).square().mean()


class Requesting(RelationalLoss):
    """Keeps what it was given."""

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Any, indices: Any, view: Any, epoch: int) -> Tensor:
        self.given = {"labels": labels, "indices": indices, "view": view, "epoch": epoch}
        return student.sum() * 0


class Perceptron(nn.Sequential):
    """For small grey pictures, without a norm that would see only its own device's share of a batch."""

    def __init__(self, pixels: int = 144, hidden: int = 16, embedding_dim: int = 8) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, embedding_dim))


class Projected(RelationalLoss):
    """Has parameters whose sizes come from the networks."""

    project: nn.Linear

    def __init__(self, student_dim: int | None = None, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.project = nn.Linear(student_dim, teacher_dim)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(self.project(student), teacher)


class Mean(StepState):
    """A running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(width, dtype=torch.float32))


class Remembers(RelationalLoss):
    """Holds the student to the running mean of the teacher's embeddings."""

    mean: Mean

    def __init__(self, teacher_dim: int | None = None, num_samples: int | None = None) -> None:
        super().__init__()
        self.set_sizes(teacher_dim=teacher_dim, num_samples=num_samples)

    def build(self, teacher_dim: int, num_samples: int) -> None:
        self.mean = Mean(teacher_dim)

    def forward(self, student: Tensor, teacher: Tensor, *, indices: Tensor) -> Tensor:
        loss = (student.mean() - self.mean.value.mean()).square()
        if self.training:
            self.mean.value = 0.9 * self.mean.value + 0.1 * teacher.mean(0)
        return loss


class Backbone(nn.Module):
    """Linear, batch norm, ReLU in place, dropout, linear: WIDTH -> 5."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, width: int = 8, out: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.act(self.norm(self.first(x)))))
        return out


def teacher(dropout: float = 0.0, norm: bool = False, seed: int = 7, width: int = 10, out: int = 7) -> Backbone:
    """A teacher of another width, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(dropout, norm, width, out)


def quantised(network: nn.Module) -> nn.Module:
    """Its Linear layers in eight bits, for the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that this will move to another package
        from torch.ao.quantization import quantize_dynamic

        done: nn.Module = quantize_dynamic(network.eval(), {nn.Linear}, dtype=torch.qint8)
    return done


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The same random rows and labels for the same seed."""

    def __init__(self, rows: int, classes: int = CLASSES, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, WIDTH, generator=generator)
        self.y = torch.randint(classes, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def gap(a: nn.Module, b: nn.Module) -> float:
    """Largest difference between the parameters and buffers of two modules; 0.0 is bit for bit."""
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(*(s.values() for s in states), strict=True))


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between tensors of the same names."""
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def attachments(*modules: nn.Module) -> list[str]:
    """Every hook, patched step and attribute that attaching may leave behind."""
    left: list[str] = []
    for module in modules:
        for name, part in module.named_modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._forward_hooks_with_kwargs):
                left += [f"{name}: {hook}" for hook in hooks.values()]
        left += [key for key in vars(module) if key.endswith("_step") or key == "manual_backward"]
    return left


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Identity, values, dtype and mode of everything in a network, to compare before and after."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    state = {k: (id(t), t.dtype, t.device, t.requires_grad, copy.deepcopy(t.detach())) for k, t in tensors.items()}
    return {"tensors": state, "modes": [m.training for m in network.modules()]}


def same(before: dict[str, Any], network: nn.Module) -> bool:
    """Whether a network is exactly what it was."""
    after = snapshot(network)
    return before["modes"] == after["modes"] and all(
        x[:4] == y[:4] and torch.equal(x[4], y[4])
        for x, y in zip(before["tensors"].values(), after["tensors"].values(), strict=True)
    )
