"""Functions from the output of a layer to an embedding, for ``Tap(layer, read=...)``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def global_pool(output: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Mean over the spatial positions: (N, C, H, W) -> (N, C).

    Example:
        >>> import torch
        >>> global_pool(torch.ones(2, 3, 4, 4), {}).shape
        torch.Size([2, 3])
    """
    x = _first_tensor(output)
    if x.ndim < 4:
        raise ValueError(
            f"global_pool takes maps (N, C, H, W), got {tuple(x.shape)}; mean_pool and cls_token take tokens (N, T, D)"
        )
    return x.flatten(2).mean(2)


def mean_pool(output: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Mean over tokens, (N, T, D) -> (N, D), without those that ``attention_mask`` (N, T) of the layer marks with 0.

    Example:
        >>> import torch
        >>> mean_pool(torch.tensor([[[1.0], [3.0]]]), {"attention_mask": torch.tensor([[1, 0]])})
        tensor([[1.]])
    """
    x = _first_tensor(output)
    if x.ndim != 3:
        raise ValueError(f"mean_pool takes tokens (N, T, D), got {tuple(x.shape)}")
    mask = kwargs.get("attention_mask")
    if mask is None:
        return x.mean(1)
    if tuple(mask.shape) != tuple(x.shape[:2]):
        raise ValueError(f"mean_pool takes an attention_mask (N, T) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    weights: Tensor = mask.to(x.dtype).unsqueeze(2)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def cls_token(output: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first token: (N, T, D) -> (N, D).

    Example:
        >>> import torch
        >>> cls_token(torch.arange(4.0).view(1, 2, 2), {})
        tensor([[0., 1.]])
    """
    x = _first_tensor(output)
    if x.ndim != 3:
        raise ValueError(f"cls_token takes tokens (N, T, D), got {tuple(x.shape)}")
    return x[:, 0]


def _first_tensor(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    first = hidden[0] if isinstance(hidden, list | tuple) and hidden else hidden
    if isinstance(first, Tensor):
        return first
    raise TypeError(f"expected a tensor or an output that begins with one, got {type(output).__name__}")
