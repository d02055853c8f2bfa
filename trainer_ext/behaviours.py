"""What a Trainer does differently with one of our optimizers, each behaviour written once.

Every function takes the trainer and the stock method (bound), so that ``register()`` can install it
on the stock Trainer and the PrecondTrainer can call it with ``super()``. With any other optimizer
each of them is the stock method and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer_ext import build, callbacks, checkpoint, model_card, resume
from trainer_ext.served import served_names

Stock = Callable[..., Any]


def get_optimizer_cls_and_kwargs(
    stock: Stock, args: TrainingArguments, model: nn.Module | None = None
) -> tuple[Any, Any]:
    """Builds our optimizers; ``optim_args`` of all others is left to the stock parser."""
    if args.optim in served_names():
        return build.optimizer_cls_and_kwargs(args, model)
    return stock(args, model)


def log(trainer: Trainer, stock: Stock, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """Adds the optimizer's health figures to the training logs."""
    optimizer = callbacks.our_optimizer(trainer.optimizer)
    if optimizer is not None and "loss" in logs:
        logs.update(callbacks.health_logs(optimizer))
    stock(logs, *args, **kwargs)


def train(
    trainer: Trainer,
    stock: Stock,
    resume_from_checkpoint: str | bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Resumes from the last complete checkpoint, where the Trainer takes the newest folder.

    Callbacks that every Trainer is to have are added first.

    Raises:
        ValueError: ``resume_from_checkpoint`` is true and there is none.
    """
    for new_callback in callbacks.FOR_EVERY_TRAINER:
        trainer.add_callback(new_callback())
    if resume_from_checkpoint is True and _is_to_be_ours(trainer) and resume.serves(trainer):
        resume_from_checkpoint = resume.last_complete_checkpoint(trainer.args.output_dir)
        if resume_from_checkpoint is None:
            raise ValueError(f"there is no complete checkpoint in {trainer.args.output_dir!r}")
    return stock(resume_from_checkpoint, *args, **kwargs)


def save_checkpoint(trainer: Trainer, stock: Stock, model: nn.Module, trial: Any = None) -> None:
    """Makes a checkpoint that is written over incomplete until it is whole again."""
    if trainer.args.should_save and callbacks.our_optimizer(trainer.optimizer) is not None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        resume.begin_checkpoint(Path(trainer._get_output_dir(trial=trial)) / name)
    stock(model, trial)


def save_state(trainer: Trainer, stock: Stock, output_dir: str) -> None:
    """Writes optimizer.safetensors and scheduler.pt instead of optimizer.pt and scheduler.pt."""
    optimizer = callbacks.our_optimizer(trainer.optimizer)
    if optimizer is None or not resume.serves(trainer):
        stock(output_dir)
        return
    if trainer.is_fsdp_enabled:
        resume.save_fsdp_weights(trainer, output_dir)
    if optimizer.shares_state or trainer.args.should_save:
        by_rank = resume.writes_by_rank(trainer)
        checkpoint.save_optimizer(optimizer, output_dir, by_rank=by_rank)
    if trainer.args.should_save:
        resume.save_scheduler(trainer, output_dir)
        model_card.write_card(trainer, optimizer, output_dir)


def load_state(trainer: Trainer, stock: Stock, folder: str | None) -> None:
    """Loads what :func:`save_state` wrote, or an optimizer.pt of ours; warns without either."""
    optimizer = callbacks.our_optimizer(trainer.optimizer)
    if folder is None or optimizer is None or not resume.serves(trainer):
        stock(folder)
        return
    resume.load_optimizer_and_scheduler(trainer, optimizer, folder)


def create_model_card(trainer: Trainer, stock: Stock, *args: Any, **kwargs: Any) -> None:
    """Adds the optimizer's section to the Trainer's model card."""
    stock(*args, **kwargs)
    optimizer = callbacks.our_optimizer(trainer.optimizer)
    if optimizer is not None and trainer.is_world_process_zero():
        model_card.add_section(trainer, optimizer, trainer.args.output_dir)


def _is_to_be_ours(trainer: Trainer) -> bool:
    """Whether a Trainer that has built no optimizer yet will build one of ours."""
    chosen = trainer.optimizer_cls_and_kwargs
    by_factory = chosen is not None and isinstance(chosen[0], build.OptimizerFactory)
    by_name = chosen is None and trainer.args.optim in served_names()
    return by_factory or by_name or callbacks.our_optimizer(trainer.optimizer) is not None
