"""How many heads an attention layer has, read from the module first and from its config second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_QUERY = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_WIDTH = ("embed_dim", "hidden_size", "d_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Head counts of one attention layer.

    Attributes:
        query: number of query heads H, also the heads of the output kernel.
        key: number of key and value heads K; H unless the model shares them (GQA, MQA).
        size: width d of one head.
    """

    query: int
    key: int
    size: int

    def of(self, piece: str) -> int:
        """Heads of a piece: K for ``"k"`` and ``"v"``, else H."""
        return self.key if piece in {"k", "v"} else self.query


def read_heads(sources: Sequence[Any]) -> Heads | None:
    """Returns the head counts found in the first source that has them, or ``None``.

    Args:
        sources: objects to ask, most trusted first: attention module, enclosing layer, config.
    """
    query = _first_count(sources, _QUERY)
    if query is None:
        return None
    size = _first_count(sources, _SIZE)
    if size is None:
        width = _first_count(sources, _WIDTH)
        if width is None or width % query:
            return None
        size = width // query
    return Heads(query=query, key=_first_count(sources, _KEY) or query, size=size)


def _first_count(sources: Sequence[Any], names: Sequence[str]) -> int | None:
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
