"""How many heads an attention layer has, read from the module first and from its config second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_QUERY = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_SHARING = ("num_key_value_groups",)
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


def read_heads(layers: Sequence[object], config: object) -> Heads | None:
    """Returns the head counts of an attention layer, or ``None`` where nobody tells them.

    A layer that knows its query heads but mentions no others has no shared ones, whatever the
    config says: Whisper's config gives the encoder's count for all.

    Args:
        layers: modules to ask, most trusted first.
        config: what to ask next.
    """
    own_query = _first_count(layers, _QUERY)
    query = own_query or _first_count((config,), _QUERY)
    if query is None:
        return None
    width = _first_count((*layers, config), _WIDTH) or 0
    sharing = _first_count(layers, _SHARING)
    return Heads(
        query=query,
        key=_first_count(layers, _KEY)
        or (query // sharing if sharing else own_query)
        or _first_count((config,), _KEY)
        or query,
        size=_first_count((*layers, config), _SIZE) or width // query,
    )


def _first_count(sources: Sequence[object], names: Sequence[str]) -> int | None:
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
