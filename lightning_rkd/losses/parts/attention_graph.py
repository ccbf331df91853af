"""The attention graph of MHGD: heads that relate the samples of a batch, and the network that trains them."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses.parts.memory import generator
from lightning_rkd.utils.files import check_file


class AttentionHeads(nn.Module):
    r"""Graphs from the vectors of a stage (front) and of the next one (back), one per head.

    .. math:: A_h = S_h R_h^\top, \quad S = \mathrm{BN}(W_s V_B), \quad R = \mathrm{BN}(W_r V_F)

    Linear maps without bias to :math:`D = \lfloor (C_B + C_F) / 2 \rfloor` channels per head, batch normalisation, and
    no division by :math:`\sqrt D`. Rows are the back stage's samples, columns the front stage's. In frozen heads a map
    and its batch norm, with running statistics, are one with a bias, the same in train and eval mode.

    Shapes: front (N, C_F), back (N, C_B) -> (heads, N, N), logits.
    """

    def __init__(self, front: int, back: int, heads: int = 8, *, frozen: bool = False) -> None:
        super().__init__()
        self.heads = heads
        width = (front + back) // 2 * heads
        self.sender, self.receiver = (_projection(channels, width, frozen) for channels in (back, front))
        self.requires_grad_(not frozen)

    def forward(self, front: Tensor, back: Tensor) -> Tensor:
        sender, receiver = self.sender(back), self.receiver(front)
        shape = (len(sender), -1, self.heads)  # the head is the last of the two factors of the width
        logits: Tensor = sender.view(shape).permute(2, 0, 1) @ receiver.view(shape).permute(2, 1, 0)
        return logits


class Estimator(nn.Module):
    r"""Estimates a stage's vectors from those of the stage before, through the graphs between the two.

    .. math:: \hat V_B = \frac{y}{\lVert y \rVert_2}, \quad
        y = W \Vert_h (G_h X) + b, \quad X = \mathrm{ReLU}(\mathrm{BN}(W_0 V_F)), \quad G_h = m_h\,\mathrm{softmax}(A_h)

    In training a sample's graph is dropped (:math:`m_{hi} = 0`) in the heads in which standard normal noise lies below
    its mean over the heads, about half of them. In evaluation all heads count half, which is ours: the published code
    drops there as well.

    Shapes: front (N, C_F), logits (heads, N, N), kept (heads, N, 1) -> (N, C_B), unit rows.
    """

    def __init__(self, front: int, back: int, heads: int = 8) -> None:
        super().__init__()
        width = (front + back) // 2
        self.features = nn.Sequential(*_projection(front, width), nn.ReLU())
        self.out = _linear(width * heads, back, bias=True)

    def forward(self, front: Tensor, logits: Tensor, kept: Tensor | float) -> Tensor:
        mixed = (logits.softmax(-1) * kept) @ self.features(front)  # (heads, N, width)
        return F.normalize(self.out(mixed.permute(1, 0, 2).flatten(1)), dim=1)


class AttentionGraph(nn.Module):
    r"""The network of MHGD's stage 1: attention heads between consecutive stages, trained by their estimates.

    The noise that drops heads depends on the seed and the number of training steps alone, so that ranks agree and a
    resumed run continues exactly.

    Shapes: for every stage (N, C), unit rows -> for every stage but the first (N, C), the estimates.
    """

    updates: Tensor

    def __init__(self, channels: Sequence[int], heads: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.channels, self.heads, self.seed = tuple(channels), heads, seed
        self.attention = attention_between(channels, heads)
        self.estimators = nn.ModuleList(Estimator(f, b, heads) for f, b in pairwise(channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The estimates, for every stage but the first."""
        noise = generator(self.seed, int(self.updates)) if self.training else None
        if self.training:
            self.updates += 1
        estimates = []
        for n, (attend, estimate) in enumerate(zip(self.attention, self.estimators, strict=True)):
            logits = attend(vectors[n], vectors[n + 1])
            kept = 0.5 if noise is None else _kept(self.heads, len(vectors[n]), noise).to(logits)
            estimates.append(estimate(vectors[n], logits, kept))
        return estimates


def attention_between(channels: Sequence[int], heads: int, *, frozen: bool = False) -> nn.ModuleList:
    """Attention heads for every pair of consecutive stages, front to back."""
    if len(channels) < 2 or heads < 1:
        raise ValueError(
            "MHGD: an attention graph relates consecutive stages: it needs the channels of at least two, and at least "
            f"one head; got channels={tuple(channels)} and heads={heads}"
        )
    return nn.ModuleList(AttentionHeads(f, b, heads, frozen=frozen) for f, b in pairwise(channels))


def load_attention(estimator: str | os.PathLike[str] | nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """Load the state of the attention heads, from a network that holds them, its state, or its checkpoint."""
    if isinstance(estimator, nn.Module):
        whole, what = estimator.state_dict(), f"this {type(estimator).__name__}"
    elif isinstance(estimator, Mapping):
        whole, what = dict(estimator), "this state"
    else:
        whole, what = _read(Path(estimator)), repr(str(estimator))
    mark = "attention.0.sender.0.weight"
    prefixes = [key.removesuffix(mark) + "attention." for key in whole if f".{key}".endswith(f".{mark}")]
    if len(prefixes) != 1:
        raise ValueError(
            f"MHGD: {what} holds {len(prefixes) or 'no'} attention graphs, where one is needed: name the checkpoint "
            "of an AttentionGraphEstimator"
        )
    return {key.removeprefix(prefixes[0]): value for key, value in whole.items() if key.startswith(prefixes[0])}


def attention_sizes(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int]:
    """Channels of the stages and number of heads, from the state of the heads."""
    pairs = sum(key.endswith(".sender.0.weight") for key in state)
    senders = [state[f"{n}.sender.0.weight"] for n in range(pairs)]
    front, back = state["0.receiver.0.weight"].shape[1], senders[0].shape[1]
    return (front, *(weight.shape[1] for weight in senders)), len(senders[0]) // ((front + back) // 2)


def freeze_attention(state: Mapping[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    r"""Compute the state of frozen heads from that of trained ones.

    .. math:: \gamma\, \frac{W x - \mu}{\sqrt{v + \epsilon}} + \beta = W' x + b'
    """
    state, frozen = {key: value.double() for key, value in state.items()}, {}
    for part in [key.removesuffix(".0.weight") for key in state if key.endswith(".0.weight")]:
        gain = state[f"{part}.1.weight"] / (state[f"{part}.1.running_var"] + eps).sqrt()
        frozen[f"{part}.weight"] = gain[:, None] * state[f"{part}.0.weight"]
        frozen[f"{part}.bias"] = state[f"{part}.1.bias"] - gain * state[f"{part}.1.running_mean"]
    return frozen


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"MHGD: there is no file {str(path)!r}; train the estimator first, or correct the path")
    try:
        check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"MHGD: {str(path)!r} is damaged or no checkpoint ({error})") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _kept(heads: int, n: int, noise: torch.Generator) -> Tensor:
    """Mask of the heads that each sample keeps, (heads, N, 1)."""
    drawn = torch.randn(heads, n, 1, generator=noise, dtype=torch.float32)
    return drawn > drawn.mean(0)


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias, dtype=torch.float32)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # as the authors begin
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _projection(inputs: int, outputs: int, frozen: bool = False) -> Any:
    if frozen:
        return _linear(inputs, outputs, bias=True)
    return nn.Sequential(_linear(inputs, outputs), nn.BatchNorm1d(outputs, dtype=torch.float32))
