"""What a Trainer does differently with one of our optimizers, each behaviour written once.

Every function takes the trainer and the stock method (bound), so that ``register()`` can install it
on the stock Trainer and the PrecondTrainer can call it with ``super()``. With any other optimizer
each of them is the stock method and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

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


def save_state(trainer: Trainer, stock: Stock, output_dir: str) -> None:
    """Writes optimizer.safetensors and scheduler.pt instead of optimizer.pt and scheduler.pt."""
    optimizer = callbacks.our_optimizer(trainer.optimizer)
    if optimizer is None or not resume.serves(trainer):
        stock(output_dir)
        return
    if trainer.args.should_save:
        checkpoint.save_optimizer(optimizer, output_dir)
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
