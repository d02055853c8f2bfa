"""Optimizer state as a flat dict of tensors keyed by parameter name, with a plain header.

    state.<parameter name>.<tensor>            state.<parameter name>.<piece>.<tensor>

Names, not positions: the file can be read beside the model it belongs to, sharded, inspected and
stored in safetensors. Loading checks everything before it changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim import adaptive_rank
from hf_precond.optim.adaptive_rank import ViewRanks
from hf_precond.optim.optimizer import PreconditionedOptimizer

FORMAT_VERSION = 1
_GROUP_STRUCTURE = {"params", "param_names", "views", "layers", "view_ranks"}


class StateMismatchError(ValueError):
    """A saved optimizer state does not belong to this optimizer and model."""


def flat_state(
    optimizer: PreconditionedOptimizer, *, first_rank_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, header) of an optimizer's state, that of a single process.

    Where several ranks share the state, all of them call this, and each gets the whole state.

    Tensors are contiguous copies-on-demand of the stacked storage: a slice that is already
    contiguous is returned as a view, so write it out before the next step. Before the first step
    there are no tensors.

    Args:
        first_rank_only: where ranks share the state, only the first one gets tensors, moved to the
            CPU one by one.

    Raises:
        StateMismatchError: if two parameters have the same name.
    """
    names = _unique_names(optimizer)
    tensors: dict[str, Tensor] = {}
    for index, key, value in optimizer.whole_state(first_rank_only=first_rank_only):
        value = value.detach().contiguous()
        tensors[f"state.{names[index]}.{key}"] = value.cpu() if first_rank_only else value
    return tensors, state_header(optimizer)


def state_header(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    """Returns as plain data what a state belongs to: optimizer, options, groups, shapes, views.

    Raises:
        StateMismatchError: if two parameters have the same name.
    """
    names, ranks = _unique_names(optimizer), optimizer.view_ranks
    return {
        "format_version": FORMAT_VERSION,
        "algorithm": optimizer.recipe.name,
        "hyperparameters": optimizer.recipe.hyperparameters(),
        "torch_version": str(torch.__version__),
        "shapes": {name: list(param.shape) for name, param in _named(optimizer, names)},
        "views": dict(
            zip(names, (v for group in optimizer.param_groups for v in group["views"]), strict=True)
        ),
        **({} if ranks is None else {"view_ranks": dict(zip(names, ranks, strict=True))}),
        "param_groups": [
            {
                **{
                    key: _plain(value)
                    for key, value in group.items()
                    if key not in _GROUP_STRUCTURE
                },
                "num_params": len(group["params"]),
            }
            for group in optimizer.param_groups
        ],
    }


def load_flat_state(
    optimizer: PreconditionedOptimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Loads what :func:`flat_state` returned, into the same or an equally built optimizer.

    Tensors keep their saved dtype where the optimizer's ``state_dtype`` is the same. Learning
    rates, weight decays and other values of the param groups are restored as well.

    Raises:
        StateMismatchError: naming the parameter or field, what was expected and what was found.
            Nothing has been changed then.
    """
    check_header(optimizer, header)
    names = _unique_names(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    ranks = saved_ranks(optimizer, header)
    expected = _expected_tensors(optimizer, names, ranks) if tensors else {}
    _check_tensors(expected, tensors)
    for key, (index, local, _) in expected.items():
        states.setdefault(index, {})[local] = tensors[key]
    load_states(optimizer, states, header)


def load_states(
    optimizer: PreconditionedOptimizer,
    states: Mapping[int, Mapping[str, Tensor]],
    header: Mapping[str, Any],
) -> None:
    """Loads state by parameter index, and the values of the param groups, both checked before."""
    groups, start = [], 0
    ranks = saved_ranks(optimizer, header)
    for group, saved in zip(optimizer.param_groups, header["param_groups"], strict=True):
        count = len(group["params"])
        values = {key: value for key, value in saved.items() if key != "num_params"}
        structure = {key: group[key] for key in _GROUP_STRUCTURE - {"params"} if key in group}
        if ranks is not None:
            structure["view_ranks"] = ranks[start : start + count]
        groups.append({**values, **structure, "params": list(range(start, start + count))})
        start += count
    optimizer.load_state_dict({"state": dict(states), "param_groups": groups})


def check_header(optimizer: PreconditionedOptimizer, header: Mapping[str, Any]) -> None:
    """Raises StateMismatchError where a header is of another optimizer, model or format."""
    names = _unique_names(optimizer)
    _expect("format version", FORMAT_VERSION, header.get("format_version"))
    _expect("optimizer", optimizer.recipe.name, header.get("algorithm"))
    groups = header.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise StateMismatchError("the header has no list of param_groups")
    _expect(
        "number of parameters per group",
        [len(group["params"]) for group in optimizer.param_groups],
        [group.get("num_params") for group in groups],
    )
    shapes, views = header.get("shapes"), header.get("views")
    if not isinstance(shapes, dict) or not isinstance(views, dict):
        raise StateMismatchError("the header has no shapes or views")
    if set(shapes) != set(names):
        missing, extra = sorted(set(names) - set(shapes)), sorted(set(shapes) - set(names))
        raise StateMismatchError(
            f"the state is of other parameters: missing {missing[:3]} ({len(missing)}), "
            f"unknown {extra[:3]} ({len(extra)})"
        )
    own_views = [plain for group in optimizer.param_groups for plain in group["views"]]
    for (name, param), plain in zip(_named(optimizer, names), own_views, strict=True):
        _expect(f"shape of {name!r}", list(param.shape), shapes[name])
        _expect(f"views of {name!r} (attention_grouping, view rules)", plain, views.get(name))


def saved_ranks(optimizer: PreconditionedOptimizer, header: Mapping[str, Any]) -> ViewRanks | None:
    """Returns the ranks that were chosen for all views, under ``rank="auto"``.

    Raises:
        StateMismatchError: they cannot be those of this optimizer.
    """
    names, saved = _unique_names(optimizer), header.get("view_ranks")
    try:
        ranks = None if saved is None else [saved[name] for name in names]
        adaptive_rank.check(ranks, optimizer.param_groups, names, optimizer.recipe)
    except (ValueError, TypeError, KeyError) as error:
        raise StateMismatchError(f"the ranks of the state do not fit: {error}") from error
    return ranks


def _expected_tensors(
    optimizer: PreconditionedOptimizer, names: list[str], ranks: ViewRanks | None
) -> dict[str, tuple[int, str, Tensor]]:
    """Full key -> (parameter index, local key, tensor on the meta device with shape and dtype)."""
    expected = {}
    for index, local, meta in optimizer.state_layout(ranks):
        expected[f"state.{names[index]}.{local}"] = (index, local, meta)
    return expected


def _check_tensors(
    expected: Mapping[str, tuple[int, str, Tensor]], tensors: Mapping[str, Tensor]
) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise StateMismatchError(
            f"the state's tensors do not fit: missing {missing[:3]} ({len(missing)}), "
            f"unknown {extra[:3]} ({len(extra)}); were rank or other hyperparameters changed?"
        )
    for key, (_, _, meta) in expected.items():
        _expect(f"shape of {key!r}", list(meta.shape), list(tensors[key].shape))
        if not tensors[key].is_floating_point():
            raise StateMismatchError(
                f"{key!r}: expected a floating dtype, found {tensors[key].dtype}"
            )


def _expect(what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise StateMismatchError(f"{what}: expected {expected!r}, found {found!r}")


def _unique_names(optimizer: PreconditionedOptimizer) -> list[str]:
    names = optimizer.param_names
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise StateMismatchError(
            f"parameters share the names {doubles[:3]}: state is keyed by name"
        )
    return names


def _named(optimizer: PreconditionedOptimizer, names: list[str]) -> list[tuple[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return list(zip(names, params, strict=True))


def _plain(value: Any) -> Any:
    """A param group's value as JSON knows it."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value
