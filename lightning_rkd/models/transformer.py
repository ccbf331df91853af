"""Networks of transformers with pooled tokens as the embedding."""

from typing import Any, Literal

from torch import Tensor, nn

from lightning_rkd.utils.imports import require

Pooling = Literal["mean", "cls"]


class TransformerEncoder(nn.Module):
    """A network of transformers for texts or images, whose tokens are pooled.

    Shapes: tokens (N, T) and their mask (N, T), or images (N, C, H, W) -> (N, hidden size).

    Args:
        source: Name or folder of a pretrained model, or a configuration as a dict, such as that of
            ``config.to_dict()``, for random weights.
        pooling: ``"mean"`` over the tokens of the mask, or ``"cls"``, the first token. Maps (N, C, H, W) are averaged.
    """

    def __init__(self, source: str | dict[str, Any], pooling: Pooling = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        transformers = require("transformers", extra="transformers")
        if isinstance(source, str):
            self.network: Any = transformers.AutoModel.from_pretrained(source)
        else:
            config = transformers.AutoConfig.for_model(**source)
            self.network = transformers.AutoModel.from_config(config)
        self.pooling = pooling
        config = self.network.config
        self.embedding_dim: int = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings (N, D) of tokens, or of images in their place."""
        inputs = {self.network.main_input_name: input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        states: Tensor = self.network(**inputs).last_hidden_state
        if states.ndim == 4:
            return states.mean((2, 3))
        if self.pooling == "cls":
            return states[:, 0]
        if attention_mask is None:
            return states.mean(1)
        weights = attention_mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
