"""The part-of-speech tagger of paper 001's Transformer benchmark.

A pre-LayerNorm encoder as in the sequence tagging example of the flax repository, on which Yen et
al. (2023, section 3.2) compare optimizers: attention without bias, ELU, sinusoidal positions that
are added after the embedding's dropout, an output layer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import TokenClassifierOutput

TAGGER_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {},
        "small": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
    }
)


class TaggerConfig(PretrainedConfig):
    """Sizes of a :class:`TaggerForTokenClassification`.

    Args:
        dropout: of embeddings, attention and feed-forward layers.
        mask_padding: leave padding out of the attention; the example of the papers attends to it.
    """

    model_type = "ud_tagger"

    def __init__(
        self,
        vocab_size: int = 100,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 256,
        dropout: float = 0.3,
        layer_norm_eps: float = 1e-6,
        mask_padding: bool = True,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.mask_padding = mask_padding
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class TaggerAttention(nn.Module):
    """Self-attention without bias; queries, keys and values head by head."""

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.dropout = config.num_attention_heads, config.dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Of hidden states [N, T, D]; a mask [N, 1, 1, T] is True where there is a word."""
        q, k, v = (
            kernel(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for kernel in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


class TaggerLayer(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm and beside a residual path."""

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = TaggerAttention(config)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Of hidden states [N, T, D]."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask))
        inner = self.dropout(F.elu(self.up_proj(self.mlp_norm(hidden))))
        return hidden + self.dropout(self.down_proj(inner))


class TaggerForTokenClassification(PreTrainedModel):
    """Tags of the words of a sentence.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    config_class = TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__(config)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} is no multiple of "
                f"num_attention_heads={config.num_attention_heads}"
            )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TaggerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Logits [N, T, K] of sentences [N, T], and the mean cross-entropy of labels but -100.

        Args:
            kwargs: ``num_items_in_batch``, over which the loss is a mean then.
            return_dict: False returns a tuple without what is None.

        Raises:
            ValueError: sentences that are too long.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens are more than max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        mask = None
        if self.config.mask_padding and attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]
        hidden = self.dropout(self.embedding(input_ids))
        hidden = hidden + sinusoids(length, self.config.hidden_size, like=hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits = self.classifier(self.norm(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return TokenClassifierOutput(loss=loss, logits=logits)


def sinusoids(length: int, width: int, *, like: Tensor) -> Tensor:
    """Fixed positions [T, D] of Vaswani et al. (2017, section 3.5): sines and cosines by turns."""
    position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    even = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angles = position * torch.exp(-math.log(10_000.0) * even / width)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return waves[:, :width].to(like.dtype)


def tagger_preset_config(name: str) -> TaggerConfig:
    """The configuration of a named preset; vocabulary and tags are those of the data.

    Raises:
        ValueError: for a name that is not in `TAGGER_PRESETS`.
    """
    if name not in TAGGER_PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(TAGGER_PRESETS)}")
    return TaggerConfig(**TAGGER_PRESETS[name])


# `from_pretrained` of the Auto classes finds what the Trainer saved, once this module is imported.
AutoConfig.register(TaggerConfig.model_type, TaggerConfig, exist_ok=True)
AutoModelForTokenClassification.register(TaggerConfig, TaggerForTokenClassification, exist_ok=True)
