"""Resuming in the Trainer: which checkpoint is whole, which state it holds, what happens without.

The Trainer writes a checkpoint file by file and trainer_state.json last. A run that is killed
meanwhile leaves a folder that looks like the newest checkpoint and is none.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model  # type: ignore[import-untyped]
from accelerate.utils.constants import FSDP_MODEL_NAME  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    is_sagemaker_mp_enabled,
    is_torch_xla_available,
)

from hf_precond.optim import adaptive_rank
from hf_precond.optim.flat_state import StateMismatchError
from hf_precond.optim.optimizer import PreconditionedOptimizer
from trainer_ext import checkpoint
from trainer_ext.build import optim_args_of
from trainer_ext.checkpoint import DamagedCheckpointError
from trainer_ext.log import get_logger

logger = get_logger(__name__)

_WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_WEIGHT_INDICES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)


class ResumeError(RuntimeError):
    """``strict_resume`` is set and the checkpoint holds no fitting optimizer state."""


def serves(trainer: Trainer) -> bool:
    """True where the state is written here; other set-ups keep the stock files."""
    return not (
        trainer.is_deepspeed_enabled or is_torch_xla_available() or is_sagemaker_mp_enabled()
    )


def writes_by_rank(trainer: Trainer) -> bool:
    """Whether each rank writes what it has: what FSDP's sharded state dicts are asked for."""
    if not trainer.is_fsdp_enabled:
        return False
    kind = trainer.accelerator.state.fsdp_plugin.state_dict_type
    return "FULL_STATE_DICT" not in str(kind)


def save_fsdp_weights(trainer: Trainer, folder: str) -> None:
    """Writes the weights from which FSDP resumes, as the Trainer does beside its optimizer."""
    save_fsdp_model(
        trainer.accelerator.state.fsdp_plugin,
        trainer.accelerator,
        trainer.model,
        folder,
        adapter_only=True,  # of a model with adapters
    )


# --- which checkpoint -----------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Returns the newest checkpoint folder that a run can go on from; None where there is none.

    A warning names each newer folder that is not whole, and what is wrong with it.
    """
    for folder in _checkpoints(Path(output_dir)):
        problem = incomplete_because(folder)
        if not problem:
            return str(folder)
        logger.warning("%s IS NOT A COMPLETE CHECKPOINT and is passed over: %s", folder, problem)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {
        folder: folder.name.removeprefix(prefix)
        for folder in output_dir.glob(f"{prefix}*")
        if folder.is_dir()
    }
    numbered = [folder for folder, step in steps.items() if step.isdecimal()]
    return sorted(numbered, key=lambda folder: int(steps[folder]), reverse=True)


def incomplete_because(folder: str | os.PathLike[str]) -> str:
    """Says what a checkpoint folder lacks to go on from; nothing where it is whole.

    The optimizer's state is verified by its checksum. Of other files it is seen that they are there
    and not cut short.
    """
    folder = Path(folder)
    try:
        _check_trainer_state(folder / TRAINER_STATE_NAME)
        _check_weights(folder)
        _check_optimizer(folder)
        _check_pickled(folder / SCHEDULER_NAME)
        _check_random_state(folder)
    except DamagedCheckpointError as error:
        return str(error)
    return ""


def begin_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Makes a checkpoint folder that is about to be written over an incomplete one.

    Else a run that is killed meanwhile would leave new weights beside an old state, each whole.
    """
    (Path(folder) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def _check_trainer_state(path: Path) -> None:
    if not path.is_file():
        raise DamagedCheckpointError(f"{path.name}, which is written last, is missing")
    try:
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error


def _check_weights(folder: Path) -> None:
    """The model, its shards, or its adapters, of which further ones have folders of their own."""
    places = (folder, *(path for path in folder.iterdir() if path.is_dir()))
    files = [place / name for place in places for name in _WEIGHTS if (place / name).is_file()]
    for name in _WEIGHT_INDICES:
        if (folder / name).is_file():
            files += [folder / shard for shard in _shards_of(folder / name)]
    # FSDP's own form: one file, or a folder of every rank's.
    files += folder.glob(f"{FSDP_MODEL_NAME}*.bin")
    if not files and not any(folder.glob(f"{FSDP_MODEL_NAME}_*/.metadata")):
        raise DamagedCheckpointError("there are no weights of the model")
    for path in files:
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        else:
            _check_pickled(path)


def _shards_of(index: Path) -> Iterable[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{index.name} cannot be read: {error}") from error


def _check_optimizer(folder: Path) -> None:
    """A state of another format version is whole; whether it fits shows when it is loaded."""
    try:
        if checkpoint.has_optimizer(folder):
            checkpoint.check_files(folder)
        else:
            _check_pickled(folder / OPTIMIZER_NAME)
    except StateMismatchError:
        return


def _check_random_state(folder: Path) -> None:
    files = sorted(folder.glob("rng_state*.pth"))
    if not files:
        raise DamagedCheckpointError("rng_state.pth is missing")
    for path in files:
        _check_pickled(path)


def _check_safetensors(path: Path) -> None:
    """The header says how long the file is; opening compares."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error


def _check_pickled(path: Path) -> None:
    """The directory of a zip archive, as which torch writes, is its end; nothing is executed."""
    if not path.is_file():
        raise DamagedCheckpointError(f"{path.name} is missing")
    if not zipfile.is_zipfile(path):
        raise DamagedCheckpointError(f"{path.name} is cut short or altered")


# --- what it holds --------------------------------------------------------------------------------


def save_scheduler(trainer: Trainer, folder: str) -> None:
    """Writes scheduler.pt as the Trainer does."""
    torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_optimizer_and_scheduler(
    trainer: Trainer, optimizer: PreconditionedOptimizer, folder: str
) -> None:
    """Loads optimizer.safetensors, or an optimizer.pt of ours, and scheduler.pt.

    Without fitting state the optimizer starts fresh, with a loud warning.

    Raises:
        DamagedCheckpointError: a file is there but damaged.
        ResumeError: no fitting state, and ``strict_resume`` is set.
    """
    problem = _load_state(optimizer, Path(folder))
    scheduler_file = Path(folder) / SCHEDULER_NAME
    if scheduler_file.is_file():
        trainer.lr_scheduler.load_state_dict(load_plain(scheduler_file))
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
            load_pickled(optimizer, folder / OPTIMIZER_NAME)
        else:
            return f"there is neither {checkpoint.FILE_NAME} nor {OPTIMIZER_NAME}"
    except StateMismatchError as error:
        return str(error)
    return ""


def load_pickled(optimizer: PreconditionedOptimizer, path: Path) -> None:
    """Loads an optimizer.pt of ours, tensors and plain data only."""
    saved = load_plain(path)
    try:
        # Those of other optimizers are refused by name below.
        if all(
            group.get("algorithm") == optimizer.algorithm_name for group in saved["param_groups"]
        ):
            _check_shapes(optimizer, saved)
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateMismatchError(f"{path.name} does not fit: {error}") from error


def load_plain(path: Path) -> Any:
    """Loads tensors and plain data, and nothing else."""
    _check_pickled(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of torch advises to load without the safeguard; ours must not.
        raise StateMismatchError(f"{path.name} holds more than tensors and plain data") from error
    except (RuntimeError, OSError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error


def _check_shapes(optimizer: PreconditionedOptimizer, saved: Any) -> None:
    """Raises ValueError for a state of other shapes, before any of it is loaded."""
    state, groups = saved["state"], saved["param_groups"]
    ranks = adaptive_rank.read(groups) if "view_ranks" in groups[0] else None
    if state:
        names = optimizer.param_names
        adaptive_rank.check(ranks, optimizer.param_groups, names, optimizer.recipe)
    expected = {(index, key): meta.shape for index, key, meta in optimizer.state_layout(ranks)}
    found = {(i, key): tensor.shape for i, of in state.items() for key, tensor in of.items()}
    unlike = [place for place in found if found[place] != expected.get(place)]
    if unlike or (found and len(found) < len(expected)):
        index, key = (unlike or sorted(set(expected) - set(found)))[0]
        raise ValueError(
            f"{key!r} of parameter {optimizer.param_names[index]!r}: expected "
            f"{expected.get((index, key))}, found {found.get((index, key))}"
        )
