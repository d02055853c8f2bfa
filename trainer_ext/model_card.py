"""Model cards: a whole README.md for a checkpoint, or our section in the Trainer's card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median_low
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import TASK_MAPPING

from hf_precond.explain import format_bytes
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import optimizer_info, option_specs, resolve
from trainer_ext.arguments import as_text
from trainer_ext.citations import bibtex
from trainer_ext.provenance import hardware

TAG = "hf-precond"
_TEMPLATES = Path(__file__).parent / "templates"
_TIMINGS = re.compile(r"eval_(runtime|.*_per_second)$")


def write_card(
    trainer: Trainer, optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]
) -> None:
    """Writes README.md into ``folder``, or adds our section to the one that is there."""
    if (Path(folder) / "README.md").is_file():
        add_section(trainer, optimizer, folder)
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag(model),
        tags=[TAG, optimizer.algorithm_name, "generated_from_trainer"],
    )
    content = render(
        "model_card.md",
        card_data=data.to_yaml(),
        title=_title(trainer),
        class_name=type(model).__name__,
        num_parameters=sum(param.numel() for param in model.parameters()),
        loadable=isinstance(model, PreTrainedModel),
        metrics=last_metrics(trainer.state.log_history),
        section=marked("", _optimizer_section(trainer, optimizer)),
    )
    ModelCard(content).save(Path(folder) / "README.md")


def add_section(
    trainer: Trainer, optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]
) -> None:
    """Puts our section and tags into the README.md of ``folder``; replaces an earlier section."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    tags = card.data.tags or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    card.data.tags = tags + [tag for tag in (TAG, optimizer.algorithm_name) if tag not in tags]
    if card.data.pipeline_tag is None:
        card.data.pipeline_tag = pipeline_tag(trainer.accelerator.unwrap_model(trainer.model))
    card.save(path)
    put_section(path, "", _optimizer_section(trainer, optimizer))


def put_section(path: Path, name: str, content: str) -> None:
    """Puts a section at the end of a card, in place of an earlier one of this name."""
    card = ModelCard.load(path)
    begin = marked(name, "").partition("\n")[0]
    end = marked(name, "").rpartition("\n")[2]
    earlier = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n*", re.DOTALL)
    card.text = f"{earlier.sub('', card.text).rstrip()}\n\n{marked(name, content)}\n"
    card.save(path)


def marked(name: str, content: str) -> str:
    """A section between the marks by which a later one finds it."""
    mark = f"{TAG} {name}".strip()
    return f"<!-- {mark}: begin -->\n{content.strip()}\n<!-- {mark}: end -->"


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, str]:
    """Returns the last evaluation's figures as text, without timings."""
    for entry in reversed(log_history):
        metrics = {
            key: f"{value:.4g}"
            for key, value in entry.items()
            if key.startswith("eval_")
            and not _TIMINGS.match(key)
            and isinstance(value, (int, float))
        }
        if metrics:
            return {**metrics, "step": str(entry.get("step", ""))}
    return {}


def changed_options(optimizer: PreconditionedOptimizer) -> dict[str, str]:
    """Returns the options that differ from the defaults, in the notation of ``optim_args``."""
    specs, values = option_specs(optimizer.algorithm_name), optimizer.recipe.hyperparameters()
    defaults = resolve(optimizer.algorithm_name).hyperparameters()
    # Some options are there only where another has called for them.
    return {
        name: as_text(values[name])
        for name, spec in specs.items()
        if name in values and as_text(values[name]) != as_text(defaults.get(name, spec.default))
    }


def pipeline_tag(model: Any) -> str | None:
    """The Hub's task of a model's class; None for a class that transformers does not know.

    >>> pipeline_tag(object()) is None
    True
    """
    name = type(model).__name__
    return next((task for task, names in TASK_MAPPING.items() if name in _flat(names)), None)


def _flat(names: Any) -> list[str]:
    """Class names of a mapping of transformers; a model type may have several."""
    return [
        name for entry in names.values() for name in ([entry] if isinstance(entry, str) else entry)
    ]


def evaluation_results(
    metrics: Mapping[str, Any], *, task: str, dataset: str, metric_names: Mapping[str, str]
) -> list[EvalResult]:
    """What the Hub shows beside a model.

    Args:
        metrics: of an evaluation.
        task: the Hub's name of it.
        metric_names: key of ``metrics`` -> the Hub's name of the metric.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric_type,
            metric_value=round(float(metrics[key]), 6),
        )
        for key, metric_type in metric_names.items()
        if key in metrics
    ]


def _optimizer_section(trainer: Trainer, optimizer: PreconditionedOptimizer) -> str:
    info = optimizer_info(optimizer.algorithm_name)
    return render(
        "optimizer_section.md",
        name=info.name,
        summary=info.summary,
        paper=info.paper,
        plan=optimizer.plan(),
        format_bytes=format_bytes,
        hyperparameters=_hyperparameters(optimizer),
        run=_run_facts(trainer),
        bibtex=bibtex(info.name),
        fallback=optimizer.recipe.fallback.fallback,
        optim_args=",".join(f"{key}={value}" for key, value in changed_options(optimizer).items()),
    )


def _hyperparameters(optimizer: PreconditionedOptimizer) -> dict[str, str]:
    first = optimizer.param_groups[0]
    groups = {
        "learning rate": f"{first.get('initial_lr', first['lr']):g}",
        "weight decay": f"{first['weight_decay']:g}",
    }
    specs, values = option_specs(optimizer.algorithm_name), optimizer.recipe.hyperparameters()
    shown = groups | {name: as_text(values[name]) for name in specs if name in values}
    if optimizer.view_ranks is not None:
        ranks = sorted(rank for of_param in optimizer.view_ranks for rank in of_param if rank)
        shown["rank"] += f" ({ranks[0]} to {ranks[-1]}, half of them up to {median_low(ranks)})"
    return shown


def _run_facts(trainer: Trainer) -> dict[str, str]:
    """What the run was, as far as the Trainer knows it."""
    args, state = trainer.args, trainer.state
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = "".join(f", {key} {value}" for key, value in (args.lr_scheduler_kwargs or {}).items())
    machine, warmup = hardware(), args.get_warmup_steps(state.max_steps)
    facts = {
        "steps": f"{state.global_step:,}",
        "batch": f"{batch:,} on {args.world_size} process{'es' if args.world_size > 1 else ''}",
        "samples seen, at most": f"{state.global_step * batch:,}",
        "schedule": f"{schedule}{kwargs}, {warmup} steps of warm-up",
        "gradient clipping": f"{args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights",
        "hardware": str(machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"),
        "software": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")
        ),
    }
    if state.num_input_tokens_seen:
        facts["tokens seen"] = f"{int(state.num_input_tokens_seen):,}"
    return facts


def _title(trainer: Trainer) -> str:
    return trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name


def render(template: str, **values: Any) -> str:
    """A template of this package with its values."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((_TEMPLATES / template).read_text()).render(**values)
