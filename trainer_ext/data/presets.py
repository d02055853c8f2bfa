"""Named model sizes for pretraining from scratch.

The 60m to 1b LLaMA shapes are those of the low-rank pretraining literature (GaLore,
Zhao et al. 2024), so that results can be set beside it. The 7m and 9m ones train on two CPU cores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_COMMAS_OUTSIDE_LISTS = re.compile(r",(?![^\[]*\])")

TOKENIZER_DECIDES = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _gpt2(
    *, width: int, layers: int, heads: int, positions: int, vocab_size: int
) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": vocab_size,
        **TOKENIZER_DECIDES,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama(
    *,
    width: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    vocab_size: int = 32000,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "max_position_embeddings": 1024,
        "vocab_size": vocab_size,
        **TOKENIZER_DECIDES,
        "tie_word_embeddings": tied,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2-7m": _gpt2(width=256, layers=4, heads=8, positions=512, vocab_size=16384),
        "llama-9m": _llama(
            width=256,
            intermediate=768,
            layers=6,
            heads=8,
            kv_heads=4,
            vocab_size=16384,
            tied=True,
        ),
        "llama-60m": _llama(width=512, intermediate=1376, layers=8, heads=8),
        "llama-130m": _llama(width=768, intermediate=2048, layers=12, heads=12),
        "llama-350m": _llama(width=1024, intermediate=2736, layers=24, heads=16),
        "llama-1b": _llama(width=2048, intermediate=5461, layers=24, heads=32),
    }
)


def preset_config(name: str) -> PretrainedConfig:
    """The configuration of a named preset.

    Raises:
        ValueError: for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
    fields = dict(PRESETS[name])
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def override_config(config: PretrainedConfig, overrides: str) -> None:
    """Sets `key=value,...` on the configuration, with the type of the value that was there.

    Lists are written as in JSON: `hidden_sizes=[16,32]`.

    Raises:
        ValueError: a malformed item, an unknown key or a value of another type.
    """
    for item in _COMMAS_OUTSIDE_LISTS.split(overrides):
        key, equals, text = item.partition("=")
        if not equals or not hasattr(config, key):
            raise ValueError(
                f"config_overrides={overrides!r}: {item!r} is not key=value with a key of "
                f"{type(config).__name__}"
            )
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            value = text
        old = getattr(config, key)
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if old is not None and type(value) is not type(old):
            raise ValueError(
                f"config_overrides={overrides!r}: {key}={text!r} must be of type "
                f"{type(old).__name__}"
            )
        setattr(config, key, value)
