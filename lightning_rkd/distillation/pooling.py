"""Functions from the output of a layer to an embedding, for ``Tap(layer, read=...)``.

``arguments`` are those of the layer's call by name. The functions for tokens find the ``attention_mask`` there, in an
argument that is a mapping, or in an output that is one. In a mask (N, T), 1 or ``True`` marks tokens; a mask
(N, 1, 1, T) or (N, 1, T, T) is boolean or, in floating point, added to attention scores: 0 for tokens.
``src_key_padding_mask`` and ``key_padding_mask`` of PyTorch's layers mark padding. Name a layer that receives the mask:
without one all tokens count.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def global_pool(output: Any, arguments: Mapping[Any, Any]) -> Tensor:
    """Mean over the spatial positions: (N, C, H, W) -> (N, C).

    Example:
        >>> global_pool(torch.ones(2, 3, 4, 4), {}).shape
        torch.Size([2, 3])
    """
    x = _first_tensor(output)
    if x.ndim < 4:
        raise ValueError(
            f"global_pool takes maps (N, C, H, W), got {tuple(x.shape)}; mean_pool and cls_token take tokens (N, T, D)"
        )
    return x.flatten(2).mean(2)


def mean_pool(output: Any, arguments: Mapping[Any, Any]) -> Tensor:
    """Mean over tokens, (N, T, D) -> (N, D), without those that the layer's attention mask marks as padding.

    Example:
        >>> mean_pool(torch.tensor([[[1.0], [3.0]]]), {"attention_mask": torch.tensor([[1, 0]])})
        tensor([[1.]])
    """
    x = _take_tokens(output, "mean_pool")
    mask = _find_mask(output, arguments, x)
    if mask is None:
        return x.mean(1)
    weights = mask.to(x.dtype).unsqueeze(2)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def last_token_pool(output: Any, arguments: Mapping[Any, Any]) -> Tensor:
    """Last token that is no padding, (N, T, D) -> (N, D), for decoders; padding may stand on the left or the right.

    Example:
        >>> last_token_pool(torch.tensor([[[1.0], [3.0]]]), {"attention_mask": torch.tensor([[1, 0]])})
        tensor([[1.]])
    """
    x = _take_tokens(output, "last_token_pool")
    mask = _find_mask(output, arguments, x)
    if mask is None:
        return x[:, -1]
    last = (mask * torch.arange(1, x.shape[1] + 1, device=mask.device)).argmax(1)
    return x[torch.arange(len(x), device=x.device), last.to(x.device)]


def cls_token(output: Any, arguments: Mapping[Any, Any]) -> Tensor:
    """The first token: (N, T, D) -> (N, D).

    Example:
        >>> cls_token(torch.arange(4.0).view(1, 2, 2), {})
        tensor([[0., 1.]])
    """
    return _take_tokens(output, "cls_token")[:, 0]


def _take_tokens(output: Any, name: str) -> Tensor:
    x = _first_tensor(output)
    if x.ndim != 3:
        cure = "global_pool takes maps" if x.ndim == 4 else "an output (N, D) needs no read"
        raise ValueError(f"{name} takes tokens (N, T, D), got {tuple(x.shape)}; {cure}")
    return x


def _find_mask(output: Any, arguments: Mapping[Any, Any], x: Tensor) -> Tensor | None:
    """Mask (N, T) of the tokens that are no padding."""
    mappings = [arguments, *(a for a in arguments.values() if isinstance(a, Mapping))]
    mappings += [output] if isinstance(output, Mapping) else []
    masks = {name: m[name] for m in reversed(mappings) for name in _MASKS if m.get(name) is not None}
    if not masks:
        return None
    name, mask = min(masks.items(), key=lambda item: _MASKS.index(item[0]))
    shape = tuple(mask.shape)
    kept: Tensor = mask
    if mask.ndim == 4:
        kept = mask[:, 0, -1]  # the last query attends to all tokens, causal or not
        kept = kept > -1000 if kept.is_floating_point() else kept != 0
    elif name != "attention_mask":
        kept = mask >= 0 if mask.is_floating_point() else ~mask.bool()
    if tuple(kept.shape) != tuple(x.shape[:2]):
        raise ValueError(
            f"the output has tokens (N, T) = {tuple(x.shape[:2])}, but the {name} is {shape}: name a layer with the "
            "mask's tokens, or read it by a function of your own"
        )
    return kept.to(x.device)


_MASKS = ("attention_mask", "src_key_padding_mask", "key_padding_mask")


def _first_tensor(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    if isinstance(hidden, Mapping):
        hidden = next((hidden[name] for name in ("last_hidden_state", "token_embeddings") if name in hidden), hidden)
    first = hidden[0] if isinstance(hidden, list | tuple) and hidden else hidden
    if isinstance(first, Tensor):
        return first
    raise TypeError(f"expected a tensor or an output that begins with one, got {type(output).__name__}")
