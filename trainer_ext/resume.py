"""Resuming in the Trainer: which state a checkpoint holds, and what happens without any."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from hf_precond.optim.flat_state import StateMismatchError
from hf_precond.optim.optimizer import PreconditionedOptimizer
from trainer_ext import checkpoint
from trainer_ext.build import optim_args_of
from trainer_ext.log import get_logger

logger = get_logger(__name__)


class ResumeError(RuntimeError):
    """``strict_resume`` is set and the checkpoint holds no fitting optimizer state."""


def serves(trainer: Trainer) -> bool:
    """True where one process can write the whole state; other set-ups keep the stock files."""
    return not (
        trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
        or is_torch_xla_available()
        or is_sagemaker_mp_enabled()
    )


def save_scheduler(trainer: Trainer, folder: str) -> None:
    """Writes scheduler.pt as the Trainer does."""
    torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_optimizer_and_scheduler(
    trainer: Trainer, optimizer: PreconditionedOptimizer, folder: str
) -> None:
    """Loads optimizer.safetensors, or an optimizer.pt of ours, and scheduler.pt.

    Without fitting state the optimizer starts fresh, with a loud warning.

    Raises:
        DamagedCheckpointError: optimizer.safetensors is there but damaged.
        ResumeError: no fitting state, and ``strict_resume`` is set.
    """
    problem = _load_state(optimizer, Path(folder))
    scheduler_file = Path(folder) / SCHEDULER_NAME
    if scheduler_file.is_file():
        trainer.lr_scheduler.load_state_dict(torch.load(scheduler_file, weights_only=True))
    if not problem:
        return
    message = f"resuming from {folder}: {problem}"
    # With an optimizer from a factory, optim_args belongs to another one.
    named = trainer.args.optim == optimizer.algorithm_name
    if named and optim_args_of(trainer.args, optimizer.algorithm_name).strict_resume:
        raise ResumeError(f"{message} (strict_resume is set)")
    logger.warning(
        "%s. THE OPTIMIZER STARTS FRESH: its statistics and momentum are empty. "
        "Set strict_resume=true in optim_args to make this an error",
        message,
    )
    for group, lr in zip(optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def _load_state(optimizer: PreconditionedOptimizer, folder: Path) -> str:
    """Loads the state that ``folder`` holds; returns what is wrong with it, or nothing."""
    try:
        if checkpoint.has_optimizer(folder):
            checkpoint.load_optimizer(optimizer, folder)
        elif (folder / OPTIMIZER_NAME).is_file():
            _load_pickled(optimizer, folder / OPTIMIZER_NAME)
        else:
            return f"there is neither {checkpoint.FILE_NAME} nor {OPTIMIZER_NAME}"
    except StateMismatchError as error:
        return str(error)
    return ""


def _load_pickled(optimizer: PreconditionedOptimizer, path: Path) -> None:
    """Loads an optimizer.pt of ours, tensors and plain data only."""
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        # The message of torch advises to load without the safeguard; ours must not.
        raise StateMismatchError(f"{path.name} holds more than tensors and plain data") from error
    except (ValueError, KeyError) as error:
        raise StateMismatchError(f"{path.name} does not fit: {error}") from error
