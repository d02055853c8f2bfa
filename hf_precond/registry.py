"""Names of optimizers and what they resolve to.

Adding an algorithm is one file in ``preconditioners`` and one entry in ``_MODULES``.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from torch import nn

from hf_precond.optim.flat_parameters import check_model_not_flat
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.optim.options import (
    AUTO,
    FallbackOptions,
    GroupingOptions,
    NumericsOptions,
    RankOptions,
    Recipe,
    ScheduleOptions,
    ShardingOptions,
)
from hf_precond.optim.stages import StageOptions
from hf_precond.optim.work import rows_may_split
from hf_precond.preconditioners import (
    adadiag,
    adafacdiag,
    block_adam,
    brand_kfac,
    frequent_directions,
    full_matrix,
    kfac,
    muon,
    ng_plus,
    randomized_kfac,
    seng,
    shampoo,
    shared_basis,
    sketchy,
    soap,
    two_sided_basis,
)
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    allowed_values,
    field_default,
    layer_needs,
    option,
)
from hf_precond.preconditioners.schedule import FORMS, Schedule
from hf_precond.statistics.layers import layer_layouts, with_known_layers
from hf_precond.views.rules import GENERAL_RULES, Assignment, ParamInfo, Rule, assign_all

_MODULES = (
    shared_basis,
    two_sided_basis,
    shampoo,
    sketchy,
    block_adam,
    full_matrix,
    frequent_directions,
    adadiag,
    adafacdiag,
    ng_plus,
    soap,
    muon,
    kfac,
    randomized_kfac,
    brand_kfac,
    seng,
)
_INFOS: dict[str, OptimizerInfo] = {info.name: info for module in _MODULES for info in module.INFOS}
_SECTIONS: dict[str, type] = {
    "stages": StageOptions,
    "grouping": GroupingOptions,
    "fallback": FallbackOptions,
    "schedules": ScheduleOptions,
    "numerics": NumericsOptions,
    "sharding": ShardingOptions,
    "ranks": RankOptions,
}
# The two decays are one public option, as in torch and transformers.
_FOLDED_INTO_BETAS = {"beta1", "beta2"}
_BETAS = option(
    (0.9, 0.999), "decay of the first and second moments", low=0, high=1, high_open=True
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One public option of an optimizer, for parsers, help texts and error messages.

    Attributes:
        type: ``int``, ``float``, ``bool``, ``str``, ``tuple`` (of floats) or :class:`Schedule`.
        optional: whether ``None`` is a value of it.
        allowed: the allowed values in words, empty where the type says it all.
        section: ``algorithm``, ``stages``, ``grouping``, ``fallback``, ``schedules``,
            ``numerics``, ``sharding`` or ``ranks``.
        word: what may be given in place of a value; empty for most.
    """

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    symbol: str
    allowed: str
    section: str
    word: str = ""


def list_optimizers() -> tuple[str, ...]:
    """Returns all registered names."""
    return tuple(_INFOS)


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest of ``words``, or an empty string."""
    close = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def optimizer_info(name: str) -> OptimizerInfo:
    """Returns the registry row of ``name``.

    Raises:
        ValueError: if there is none; the message names the nearest and all valid names.
    """
    if name not in _INFOS:
        raise ValueError(
            f"unknown optimizer {name!r}.{nearest(name, _INFOS)} Valid names: {', '.join(_INFOS)}"
        )
    return _INFOS[name]


def option_specs(name: str) -> dict[str, OptionSpec]:
    """Returns the public options of an optimizer by name, the algorithm's own first.

    Raises:
        ValueError: if ``name`` is not registered.
    """
    info = optimizer_info(name)
    specs = [
        _spec(info, item, hints[item.name], section)
        for section, cls, hints in _option_classes(info)
        for item in fields(cls)
        if item.name not in _FOLDED_INTO_BETAS and item.name not in info.fixed
    ]
    betas = OptionSpec(
        name="betas",
        type=tuple,
        optional=False,
        default=info.defaults.get("betas", _BETAS.default),
        help=_BETAS.metadata["help"],
        symbol="",
        allowed=allowed_values(_BETAS.metadata),
        section="stages",
    )
    own = [spec for spec in specs if spec.section == "algorithm"]
    rest = [spec for spec in specs if spec.section != "algorithm"]
    return {spec.name: spec for spec in (*own, betas, *rest)}


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Turns a name and flat options into a recipe.

    Raises:
        ValueError: unknown name or option (with the nearest valid one), a value of a wrong type or
            outside its range.
    """
    info, specs = optimizer_info(name), option_specs(name)
    given = dict(options or {})
    for key, value in given.items():
        if key not in specs:
            raise ValueError(
                f"{name} has no option {key!r}.{nearest(key, specs)} "
                f"Valid options: {', '.join(specs)}"
            )
        given[key] = _checked_type(specs[key], value)
    adapts_rank = given.get("rank") == AUTO
    if adapts_rank:
        given["rank"] = specs["rank"].default
    else:
        _check_without_auto(given, specs)
    values = {key: spec.default for key, spec in specs.items()} | given
    beta1, beta2 = _checked_betas(values.pop("betas"))
    if values.get("graft_beta2") is None:
        values["graft_beta2"] = beta2
    values |= {"beta1": beta1, "beta2": beta2, **info.fixed}
    parts = {
        section: cls(
            **{item.name: values[item.name] for item in fields(cls) if item.name in values}
        )
        for section, cls, _ in _option_classes(info)
    }
    check_stages = getattr(parts["algorithm"], "check_stages", None)
    if check_stages is not None:
        check_stages(parts["stages"])
    if values["sharding"] == "blocks" and not rows_may_split(parts["algorithm"]):
        able = [row.name for row in _INFOS.values() if rows_may_split(row.algorithm)]
        raise ValueError(
            f"sharding = 'blocks' is not allowed for {name}, whose blocks need each other: "
            f"it must be 'auto', 'replicated' or 'owner' (blocks: {', '.join(able)})"
        )
    return Recipe(name=name, betas=(beta1, beta2), adapts_rank=adapts_rank, **parts)


def create_optimizer(
    model: nn.Module | Iterable[Any],
    name: str,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    rules: Iterable[Rule] | None = None,
    **options: Any,
) -> PreconditionedOptimizer:
    """Builds an optimizer by name for a plain PyTorch loop.

    Args:
        model: a module (parameters get their views from ``rules``), or what torch optimizers take:
            parameters, ``named_parameters()`` or param groups (views follow from shapes alone).
        name: a registered name, see :func:`list_optimizers`.
        lr: learning rate of the groups that give none.
        weight_decay: decoupled weight decay. With a module it leaves out vectors (norms, biases).
        rules: view rules, first match wins; default :data:`GENERAL_RULES`.
        **options: options of the optimizer, see :func:`option_specs`.

    Raises:
        ValueError: for an unknown name or option, or a value that is not allowed.
    """
    recipe = resolve(name, options)
    if not isinstance(model, nn.Module):
        return PreconditionedOptimizer(model, recipe, lr=lr, weight_decay=weight_decay)
    check_model_not_flat(model)
    groups = param_groups(model, recipe, rules=rules, weight_decay=weight_decay)
    optimizer = PreconditionedOptimizer(groups, recipe, lr=lr, weight_decay=weight_decay)
    optimizer.attach(model)
    return optimizer


def param_groups(
    model: nn.Module,
    recipe: Recipe,
    *,
    rules: Iterable[Rule] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Returns two param groups of a model's trainable parameters, matrices and vectors (never
    decayed).

    Each holds named parameters and, index-aligned, views and layers as plain lists.
    """
    matrices: dict[str, Any] = {"params": [], "views": [], "layers": []}
    matrices["weight_decay"] = weight_decay
    vectors: dict[str, Any] = {"params": [], "views": [], "layers": [], "weight_decay": 0.0}
    for info, assignment, layer in assign_layers(model, recipe, rules):
        group = vectors if info.param.ndim < 2 else matrices
        group["params"].append((info.name, info.param))
        group["views"].append([view.to_plain() for view in assignment.views])
        group["layers"].append(layer)
    return [group for group in (matrices, vectors) if group["params"]]


def assign_layers(
    model: nn.Module, recipe: Recipe, rules: Iterable[Rule] | None = None
) -> list[tuple[ParamInfo, Assignment, list[Any]]]:
    """Returns every trainable parameter with its views and, for algorithms that look inside the
    layers, how its layer reads it as a plain list.

    Args:
        rules: view rules, first match wins; default :data:`GENERAL_RULES`.
    """
    assigned = assign_all(model, GENERAL_RULES if rules is None else rules)
    if layer_needs(recipe.algorithm) is None:
        return [(info, assignment, []) for info, assignment in assigned]
    assigned = with_known_layers(assigned)
    layouts = layer_layouts(assigned)
    return [(*pair, layout) for pair, layout in zip(assigned, layouts, strict=True)]


def _option_classes(info: OptimizerInfo) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for section, cls in {"algorithm": info.algorithm, **_SECTIONS}.items():
        if section != "ranks" or _may_adapt_rank(info):
            yield section, cls, get_type_hints(cls)


def _may_adapt_rank(info: OptimizerInfo) -> bool:
    """Whether ``rank="auto"`` is a rank of an optimizer."""
    return any(item.metadata.get("word") == AUTO for item in fields(cast(Any, info.algorithm)))


def _check_without_auto(given: Mapping[str, Any], specs: Mapping[str, OptionSpec]) -> None:
    """Raises ValueError for options that only ``rank="auto"`` reads."""
    for key, value in given.items():
        if specs[key].section == "ranks" and value != specs[key].default:
            rank = given.get("rank", specs["rank"].default)
            raise ValueError(f"{key} is not allowed with rank = {rank!r}: it needs rank = {AUTO!r}")


def _spec(info: OptimizerInfo, item: Field[Any], hint: Any, section: str) -> OptionSpec:
    kind, optional = _plain_type(hint)
    return OptionSpec(
        name=item.name,
        type=kind,
        optional=optional,
        default=info.defaults.get(item.name, field_default(item)),
        help=item.metadata["help"],
        symbol=item.metadata["symbol"],
        allowed=allowed_values(item.metadata),
        section=section,
        word=item.metadata["word"],
    )


def _plain_type(hint: Any) -> tuple[type, bool]:
    """Splits ``int | None`` into (int, True)."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return _plain_type(kinds[0])[0], len(kinds) < len(get_args(hint))
    return get_origin(hint) or hint, False


def _checked_type(spec: OptionSpec, value: Any) -> Any:
    """Returns ``value`` in the option's type; an int may be a float, a bool is no number."""
    if (value is None and spec.optional) or (spec.word and value == spec.word):
        return value
    if spec.type is float and _is_number(value):
        return float(value)
    if spec.type is tuple and isinstance(value, (list, tuple)) and all(map(_is_number, value)):
        return tuple(value)
    if spec.type is Schedule:
        with suppress(ValueError):
            return Schedule.parse(value)
    elif type(value) is spec.type and spec.type is not tuple:
        return value
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a word",
        tuple: "a list of numbers",
        Schedule: FORMS,
    }
    none = " or none" if spec.optional else ""
    allowed = f" ({spec.allowed})" if spec.allowed else ""
    raise ValueError(
        f"{spec.name} = {value!r} is not allowed: it must be {words[spec.type]}{none}{allowed}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked_betas(betas: tuple[Any, ...]) -> tuple[float, float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas = {betas!r} is not allowed: it must be two numbers, each >= 0 and < 1"
        )
    return float(betas[0]), float(betas[1])
