"""Whether a state dict fits an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STATE_VERSION = 1


def check_foreign(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], name: str
) -> None:
    """Refuses a state dict that another optimizer, version or grouping wrote.

    Args:
        param_groups: of the optimizer that is to take it.
        name: of its algorithm.

    Raises:
        ValueError: if the state belongs to another algorithm, version, or other views.
    """
    for own, saved in zip(param_groups, state_dict["param_groups"], strict=False):
        writer, version = saved.get("algorithm"), saved.get("state_version")
        if writer != name:
            raise ValueError(
                f"the state dict was written by optimizer {writer or 'of another package'!r}, "
                f"this one is {name!r}"
            )
        if version != STATE_VERSION:
            raise ValueError(
                f"the state dict has state_version {version!r}, this package reads {STATE_VERSION}"
            )
        changed = [key for key in ("views", "layers") if saved.get(key) != own[key]]
        if state_dict["state"] and changed:
            raise ValueError(
                f"the state dict was written with other {changed[0]} of the parameters: check "
                "attention_grouping, the view rules and the order of the parameters"
            )
