"""What training scripts share: options of the model, resuming, running, saving, closing lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from trainer_ext.config_file import parse_config_and_command_line
from trainer_ext.data.presets import override_config
from trainer_ext.resume import last_complete_checkpoint
from trainer_ext.step_times import StepTimesCallback

Metrics = dict[str, float]
Figure = tuple[str, str, str]
"""Label, name of the metric, format."""


# --- options --------------------------------------------------------------------------------------


def preset_option(presets: Iterable[str], default: str) -> Any:
    """The dataclass field `preset` with the names that a script has."""
    names = ", ".join(presets)
    text = f"Train a named size from scratch: {names}. {default} when no model is named."
    return field(default=None, metadata={"help": text})


def overrides_option(example: str) -> Any:
    """The dataclass field `config_overrides` with an example for the models of a script."""
    text = f"Changes to the config of a new model, as {example}."
    return field(default=None, metadata={"help": text})


@dataclass(kw_only=True)
class ModelChoice:
    """Which model: at most one of `preset`, `config_name` and `model_name_or_path`.

    A script's own dataclass gives `DEFAULT_PRESET`, and `preset` and `config_overrides` anew with
    its own help.
    """

    DEFAULT_PRESET: ClassVar[str]

    preset: str | None = None
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch by a config: a model type, a folder or a Hub name."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Continue from the weights in a folder or on the Hub."}
    )
    config_overrides: str | None = None

    def __post_init__(self) -> None:
        named = {
            name: getattr(self, name)
            for name in ("preset", "config_name", "model_name_or_path")
            if getattr(self, name) is not None
        }
        if len(named) > 1:
            options = " and ".join(f"{name}={value!r}" for name, value in named.items())
            raise ValueError(f"{options} exclude each other; give at most one")
        if not named:
            self.preset = self.DEFAULT_PRESET
        if self.model_name_or_path is not None and self.config_overrides is not None:
            raise ValueError(
                f"config_overrides={self.config_overrides!r} would not fit the weights of "
                f"model_name_or_path={self.model_name_or_path!r}; only new models take it"
            )

    def load_config(self, preset_config: Callable[[str], PretrainedConfig]) -> PretrainedConfig:
        """The model's configuration, with the overrides for a new model.

        Args:
            preset_config: makes the configuration of a preset.

        Raises:
            ValueError: an unknown preset, or overrides that do not fit the configuration.
        """
        if self.model_name_or_path is not None:
            return AutoConfig.from_pretrained(self.model_name_or_path)
        if self.preset is not None:
            config = preset_config(self.preset)
        elif self.config_name in CONFIG_MAPPING:
            config = CONFIG_MAPPING[self.config_name]()
        else:
            config = AutoConfig.from_pretrained(self.config_name)
        if self.config_overrides:
            override_config(config, self.config_overrides)
        return config


def check_minima(options: Any, **minima: float) -> None:
    """Checks fields of a dataclass that are set.

    Raises:
        ValueError: one is below its minimum.
    """
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def parse_training_arguments(task: Task, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Options of the model, the data and the Trainer, which trains and evaluates by default."""
    return parse_config_and_command_line(
        (task.model_type, task.data_type, task.training_type),
        argv,
        defaults={
            "do_train": True,
            "do_eval": True,
            # Pinning host memory helps copies to an accelerator only.
            "dataloader_pin_memory": torch.accelerator.is_available(),
        },
        description=task.description,
    )


# --- runs -----------------------------------------------------------------------------------------


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError of the preparation into one line on stderr and exit status 2."""
    try:
        yield
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The folder to resume from; `--resume_from_checkpoint true` is the last whole one.

    Raises:
        ValueError: there is no such checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=true: {args.output_dir!r} has no checkpoint that is "
                "complete"
            )
        return checkpoint
    if not Path(wanted).is_dir():
        raise ValueError(f"resume_from_checkpoint={wanted!r} is not a folder")
    return str(wanted)


def new_trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
    *,
    trainer_class: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """A Trainer whose optimizer's options are checked now, not after the first batch is read.

    Raises:
        ValueError: options of the optimizer that are wrong or do not fit the model.
    """
    trainer_class.get_optimizer_cls_and_kwargs(args, model)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset if args.do_train else None,
        eval_dataset=eval_dataset,
        **options,
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a training program adds to the course that all runs take.

    Attributes:
        description: of ``--help``.
        build_trainer: from the options of the model, the data and the Trainer; raises ValueError
            for options that do not fit each other or the data.
        complete: adds to the metrics of the last evaluation.
        figures: what the closing lines show.
        hub_task: name of the task in model cards.
        data_name: what model cards call the data.
    """

    description: str
    model_type: type[ModelChoice]
    data_type: type
    build_trainer: Callable[[Any, Any, Any], Trainer]
    figures: Sequence[Figure]
    hub_task: str
    data_name: Callable[[Any], str]
    training_type: type[TrainingArguments] = TrainingArguments
    complete: Callable[[Trainer, Metrics], None] = lambda trainer, metrics: None


def run_task(task: Task, argv: Sequence[str] | None) -> Metrics:
    """Parses, prepares, trains, evaluates, saves; returns the final metrics."""
    model_args, data_args, args = parse_training_arguments(task, argv)
    with one_line_errors():
        if not args.do_train and not args.do_eval:
            raise ValueError("do_train=False and do_eval=False leave nothing to do")
        if args.data_seed is None:
            args.data_seed = args.seed
        checkpoint = find_checkpoint(args)
        trainer = task.build_trainer(model_args, data_args, args)
    metrics = train_and_evaluate(trainer, checkpoint, partial(task.complete, trainer))
    if data_args.save_final_model:
        save_results(
            trainer,
            task=task.hub_task,
            dataset=task.data_name(data_args),
            finetuned_from=model_args.model_name_or_path,
        )
    if trainer.is_world_process_zero():
        print(summary(task.figures, metrics, Path(args.output_dir)))
    return metrics


def train_and_evaluate(
    trainer: Trainer,
    checkpoint: str | None,
    complete: Callable[[Metrics], None] = lambda metrics: None,
) -> Metrics:
    """Trains and evaluates as `do_train` and `do_eval` say; writes the metrics files.

    Training's metrics have the times of a step and the memory (:mod:`trainer_ext.step_times`).

    Args:
        complete: adds to the metrics of the evaluation.
    """
    metrics: Metrics = {}
    if trainer.args.do_train:
        times = StepTimesCallback()
        trainer.add_callback(times)
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        train_metrics |= {f"train_{name}": figure for name, figure in times.figures.items()}
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        metrics |= train_metrics
    if trainer.args.do_eval:
        eval_metrics = trainer.evaluate()
        complete(eval_metrics)
        trainer.log_metrics("eval", eval_metrics)
        trainer.save_metrics("eval", eval_metrics)
        metrics |= eval_metrics
    trainer.save_state()
    return metrics


def save_results(trainer: Trainer, *, task: str, dataset: str, finetuned_from: str | None) -> None:
    """Saves the model and writes the model card, pushed if asked for."""
    trainer.save_model()
    if finetuned_from is None:
        # The stock card calls a model without a name a fine-tuned version of nothing; one whose
        # name is a folder it takes for trained from scratch, as this is.
        trainer.model.config.name_or_path = trainer.args.output_dir
    card = {"tasks": task, "dataset": dataset, "finetuned_from": finetuned_from}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def summary(figures: Sequence[Figure], metrics: Mapping[str, float], output_dir: Path) -> str:
    """The closing lines: the figures that matter and where the files are."""
    shown = [f"{label} {metrics[key]:{form}}" for label, key, form in figures if key in metrics]
    files = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    return f"\n{', '.join(shown)}\n{output_dir}/: {', '.join(files)}"
