"""A model and arguments -> an optimizer whose groups know parameter names and matrix views.

The groups themselves are always the Trainer's (or the caller's): a :class:`Layout` only writes
names and views beside their parameters. So the decay / no-decay split, its order and every override
of it by a subclass or a script stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from hf_precond import explain
from hf_precond.host_memory import keep_freed_memory
from hf_precond.optim.flat_parameters import check_model_not_flat, flat_message
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.optim.options import Recipe
from hf_precond.preconditioners.base import layer_needs
from hf_precond.registry import assign_layers, option_specs, resolve
from hf_precond.views.rules import (
    Assignment,
    ParamInfo,
    Rule,
    canonical_name,
    fallback,
)
from trainer_ext.arguments import OptimArgs, parse_optim_args
from trainer_ext.layers import view_rules

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Name, plain views and layer of each parameter of one model."""

    model: nn.Module
    entries: Mapping[Tensor, tuple[str, list[Any], list[Any]]]

    def annotate(self, params: Iterable[Any]) -> Groups:
        """Returns parameter groups (or bare parameters) with names, views and layers beside.

        Raises:
            ValueError: a parameter that the model does not have.
        """
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        return [self._annotate_group(group) for group in groups]

    def _annotate_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        foreign = [tuple(param.shape) for param in params if param not in self.entries]
        if foreign:
            raise ValueError(
                f"{len(foreign)} parameters in the groups are not parameters of the model, "
                f"the first of shape {foreign[0]}"
            )
        names = [self.entries[param][0] for param in params]
        views = [self.entries[param][1] for param in params]
        layers = [self.entries[param][2] for param in params]
        return {**group, "params": params, "param_names": names, "views": views, "layers": layers}


class TrainerOptimizer(PreconditionedOptimizer):
    """The optimizer class that the Trainer calls with its own parameter groups."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        layout: Layout,
        recipe: Recipe,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(layout.annotate(params), recipe, lr=lr, weight_decay=weight_decay)
        self.attach(layout.model)


class OptimizerFactory:
    """Builds one of our optimizers in ``Trainer(optimizer_cls_and_kwargs=...)``.

    ``(OptimizerFactory("shared_basis_adagrad", rank=32), {"lr": 1e-3})``. Keeps the
    Trainer's split into parameters with and without weight decay.

    Args:
        name: a name of :func:`hf_precond.registry.list_optimizers`.
        defaults: ``lr``, ``weight_decay`` and options; the keyword arguments override them.
    """

    def __init__(self, name: str, **defaults: Any) -> None:
        self.name = name
        self.defaults = defaults

    def __call__(self) -> Callable[..., PreconditionedOptimizer]:
        return self.build

    def build(self, model: nn.Module, **overrides: Any) -> PreconditionedOptimizer:
        """Returns the optimizer of ``model``.

        Raises:
            ValueError: unknown options, or no ``lr``.
        """
        arguments = {**self.defaults, **overrides}
        if "lr" not in arguments:
            raise ValueError(
                f"OptimizerFactory({self.name!r}) needs lr, here or in the keyword arguments"
            )
        return build_optimizer(model, self.name, **arguments)


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    groups: Iterable[Any] | None = None,
    **options: Any,
) -> PreconditionedOptimizer:
    """Returns the optimizer of a model, with the view rules of its architecture.

    Args:
        groups: parameter groups; by default the Trainer's two, with and without weight decay.
        options: typed options of the optimizer (:func:`hf_precond.registry.option_specs`).

    Raises:
        ValueError: unknown name or option, a value out of range, sharded or foreign parameters.
    """
    check_model_not_flat(model)
    recipe = resolve(name, options)
    layout = make_layout(model, recipe)
    groups = decay_groups(model, weight_decay) if groups is None else groups
    return TrainerOptimizer(groups, layout=layout, recipe=recipe, lr=lr, weight_decay=weight_decay)


def explain_groups(model: nn.Module, name: str, **options: Any) -> list[explain.GroupRow]:
    """Returns one row per parameter: view, algorithm, rank, state bytes and why.

    Raises:
        ValueError: unknown name or option, or a value out of range.
    """
    rules = architecture_rules(model, resolve(name, options))
    return explain.explain_groups(model, name, rules=rules, **options)


def optimizer_cls_and_kwargs(
    args: TrainingArguments, model: nn.Module | None
) -> tuple[type[PreconditionedOptimizer], dict[str, Any]]:
    """Returns the class and keyword arguments that the Trainer builds the optimizer from.

    On a CPU the process is told to keep freed memory, see :func:`hf_precond.keep_freed_memory`.

    Raises:
        ValueError: no model, a bad ``optim_args``, DeepSpeed or FSDP version 1, several GPUs in one
            process for a method that looks inside the layers, or no target module that matches.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if model is None:
        raise ValueError(
            f"optim={name!r} needs the model: it maps each layer to matrices. "
            "Call get_optimizer_cls_and_kwargs(args, model)"
        )
    if getattr(args.distributed_state, "distributed_type", None) == DistributedType.DEEPSPEED:
        raise ValueError(flat_message("DeepSpeed"))
    check_model_not_flat(model)
    recipe = resolve(name, options_from(args, name))
    # More than one GPU in one process: the Trainer wraps the model in nn.DataParallel.
    if layer_needs(recipe.algorithm) is not None and args.n_gpu > 1:
        raise ValueError(
            f"optim={name!r} looks inside the layers, which nn.DataParallel copies for each of "
            f"{args.n_gpu} GPUs: start one process per GPU (torchrun, accelerate launch), or show "
            "it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    targets = target_rules(args.optim_target_modules)
    layout = make_layout(model, recipe, extra_rules=targets)
    if targets and not any(views for _, views, _ in layout.entries.values()):
        raise ValueError(
            f"optim_target_modules = {args.optim_target_modules!r} matches no layer "
            f"that {name} can precondition"
        )
    if args.device.type == "cpu":
        keep_freed_memory()
    kwargs = {
        "layout": layout,
        "recipe": recipe,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
    }
    return TrainerOptimizer, kwargs


def options_from(args: TrainingArguments, name: str) -> dict[str, Any]:
    """Returns the options of ``name``: ``optim_args`` over the Adam fields of the arguments.

    Raises:
        ValueError: a bad ``optim_args``.
    """
    specs = option_specs(name)
    options: dict[str, Any] = {}
    if "betas" in specs:
        beta1, beta2 = specs["betas"].default
        options["betas"] = _changed(args, "adam_beta1", beta1), _changed(args, "adam_beta2", beta2)
    if "fallback_eps" in specs:
        options["fallback_eps"] = _changed(args, "adam_epsilon", specs["fallback_eps"].default)
    return {**options, **optim_args_of(args, name).options}


def _changed(args: TrainingArguments, field: str, own_default: float) -> float:
    """Returns a field of the arguments, or the optimizer's default where the field is untouched."""
    value = getattr(args, field)
    return own_default if value == TrainingArguments.__dataclass_fields__[field].default else value


def optim_args_of(args: TrainingArguments, name: str) -> OptimArgs:
    """Returns the parsed ``optim_args`` and the typed fields of PrecondTrainingArguments.

    Raises:
        ValueError: a bad ``optim_args``.
    """
    parsed = parse_optim_args(name, args.optim_args, getattr(args, "optim_options", None))
    strict = parsed.strict_resume or getattr(args, "strict_resume", False)
    return replace(parsed, strict_resume=strict)


def make_layout(model: nn.Module, recipe: Recipe, extra_rules: Sequence[Rule] = ()) -> Layout:
    """Returns names and views of all parameters of ``model``; frozen ones follow the fallback."""
    entries: dict[Tensor, tuple[str, list[Any], list[Any]]] = {
        param: (canonical_name(name), [], []) for name, param in model.named_parameters()
    }
    rules = (*extra_rules, *architecture_rules(model, recipe))
    for info, assignment, layer in assign_layers(model, recipe, rules):
        views = [view.to_plain() for view in assignment.views]
        entries[info.param] = info.name, views, layer
    return Layout(model, entries)


def architecture_rules(model: nn.Module, recipe: Recipe) -> tuple[Rule, ...]:
    """Returns the view rules of the model's architecture under the recipe's options."""
    return view_rules(
        model,
        attention_grouping=recipe.grouping.attention_grouping,
        min_head_dim=recipe.min_block_size,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Returns the Trainer's two groups: with weight decay, then norms and biases without."""
    # The method takes the instance only to be overridable.
    with_decay = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [
        {
            "params": [p for name, p in trainable if name in with_decay],
            "weight_decay": weight_decay,
        },
        {"params": [p for name, p in trainable if name not in with_decay], "weight_decay": 0.0},
    ]


def target_rules(targets: str | Sequence[str] | None) -> tuple[Rule, ...]:
    """Returns the rule that sends everything outside ``optim_target_modules`` to the fallback."""
    if targets is None:
        return ()
    all_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"

    def target_rule(info: ParamInfo) -> Assignment | None:
        linear = all_linear and isinstance(info.module, (nn.Linear, Conv1D))
        if linear or check_target_module_exists(targets, info.module_name):
            return None
        return fallback("not in optim_target_modules")

    return (target_rule,)


def plan_line(optimizer: PreconditionedOptimizer) -> str:
    """Returns one line: how many parameters and state bytes each algorithm got."""
    parts = [
        f"{row.algorithm} {row.num_params:,} parameters in {row.num_tensors} tensors, "
        f"{explain.format_bytes(row.state_bytes)} state"
        for row in sorted(
            optimizer.plan(), key=lambda row: row.algorithm != optimizer.algorithm_name
        )
    ]
    return f"{optimizer.algorithm_name}: {'; '.join(parts)}"
