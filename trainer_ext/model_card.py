"""Model cards: a whole README.md for a checkpoint, or our section in the Trainer's card."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedModel, Trainer

from hf_precond.explain import format_bytes
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import optimizer_info, option_specs, resolve
from trainer_ext.arguments import as_text

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
        library_name="transformers", tags=[TAG, optimizer.algorithm_name, "generated_from_trainer"]
    )
    content = render(
        "model_card.md",
        card_data=data.to_yaml(),
        title=_title(trainer),
        class_name=type(model).__name__,
        num_parameters=sum(param.numel() for param in model.parameters()),
        loadable=isinstance(model, PreTrainedModel),
        metrics=last_metrics(trainer.state.log_history),
        section=marked("", _optimizer_section(optimizer)),
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
    card.save(path)
    put_section(path, "", _optimizer_section(optimizer))


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
    values = optimizer.recipe.hyperparameters()
    defaults = resolve(optimizer.algorithm_name).hyperparameters()
    return {
        name: as_text(values[name])
        for name in option_specs(optimizer.algorithm_name)
        if as_text(values[name]) != as_text(defaults[name])
    }


def _optimizer_section(optimizer: PreconditionedOptimizer) -> str:
    info = optimizer_info(optimizer.algorithm_name)
    return render(
        "optimizer_section.md",
        name=info.name,
        summary=info.summary,
        paper=info.paper,
        plan=optimizer.plan(),
        format_bytes=format_bytes,
        hyperparameters=_hyperparameters(optimizer),
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
    return groups | {name: as_text(values[name]) for name in specs if name in values}


def _title(trainer: Trainer) -> str:
    return trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name


def render(template: str, **values: Any) -> str:
    """A template of this package with its values."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((_TEMPLATES / template).read_text()).render(**values)
