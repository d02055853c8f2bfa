"""optimizer.safetensors: the optimizer's state, atomic, checksummed, never pickled.

One safetensors file, or shards with an index above ``max_shard_size``:

    optimizer.safetensors
    optimizer-00001-of-00003.safetensors ... and optimizer.safetensors.index.json

Tensors are keyed by parameter name (:mod:`hf_precond.optim.flat_state`). The metadata holds

    format    "pt"
    header    JSON text: format and package versions, optimizer, hyperparameters, groups, shapes
    sha256    hex digest of the header text, then for each tensor in the order of sorted names of
              "<name>\\0<dtype>\\0<comma-joined sizes>\\0" and its bytes, row-major

Where ranks share the state, each may write its own part (:mod:`trainer_ext.rank_files`).

The index names the digest of each shard, so that shards of different saves cannot be mixed.

Learning rates and weight decays come from the file. Options do not: a state that was written under
others is taken over where it fits, with a warning that names them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from math import inf
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from hf_precond.optim.flat_state import (
    StateMismatchError,
    flat_state,
    load_flat_state,
    saved_ranks,
)
from hf_precond.optim.optimizer import STATE_VERSION, PreconditionedOptimizer
from trainer_ext import rank_files
from trainer_ext.log import get_logger
from trainer_ext.state_files import (
    DamagedCheckpointError,
    digest,
    read_file,
    read_file_contents,
    versions,
    write_atomically,
    write_file,
)

__all__ = [
    "DamagedCheckpointError",
    "check_files",
    "digest",
    "has_optimizer",
    "load_optimizer",
    "read_contents",
    "read_state",
    "save_optimizer",
]

logger = get_logger(__name__)

FILE_NAME = "optimizer.safetensors"
INDEX_NAME = "optimizer.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
_PATTERN = "optimizer{suffix}.safetensors"
_SHARDS = "optimizer-*-of-*.safetensors"


def save_optimizer(
    optimizer: PreconditionedOptimizer,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    by_rank: bool = False,
) -> None:
    """Writes the optimizer's state into ``folder``, on the first of several ranks.

    Where ranks share the state, all of them call this and return when it is written.
    A crash leaves a previous file whole, and of previous shards at worst a mixture that a load
    refuses. What crashes have left behind is removed.

    Args:
        max_shard_size: bytes, or text such as ``"5GB"``; a larger state is written in shards.
        by_rank: where ranks share the state, each writes its own part
            (:mod:`trainer_ext.rank_files`): nothing is gathered.
    """
    folder = Path(folder)
    if by_rank and optimizer.shares_state:
        written = rank_files.save(optimizer, folder)
    else:
        tensors, header = flat_state(optimizer, first_rank_only=True)
        written = set()
        if optimizer.is_first_rank:
            written = _write_state(folder, tensors, header, max_shard_size)
    if optimizer.is_first_rank:
        for stale in set(_state_files(folder)) - written:
            (folder / stale).unlink(missing_ok=True)
    if optimizer.shares_state and optimizer.comm is not None:
        optimizer.comm.wait()


def _write_state(
    folder: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    max_shard_size: int | str,
) -> set[str]:
    """Writes whole tensors and returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header, "versions": versions()}, sort_keys=True)
    # On meta tensors the split sees sizes only: state tensors of one stack share their storage.
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()},
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    digests = {
        file_name: write_file(folder / file_name, {name: tensors[name] for name in names}, text)
        for file_name, names in plan.filename_to_tensors.items()
    }
    written = set(digests)
    if plan.is_sharded:
        index = {"metadata": {"sha256": digests}, "weight_map": plan.tensor_to_filename}
        write_atomically(
            folder / INDEX_NAME, lambda path: path.write_text(json.dumps(index, indent=2))
        )
        written.add(INDEX_NAME)
    return written


def has_optimizer(folder: str | os.PathLike[str]) -> bool:
    """True if ``folder`` holds state written by :func:`save_optimizer`."""
    names = (FILE_NAME, INDEX_NAME, rank_files.INDEX_NAME)
    return any((Path(folder) / name).is_file() for name in names)


def load_optimizer(optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]) -> None:
    """Loads what :func:`save_optimizer` wrote, once all checks have passed.

    Raises:
        DamagedCheckpointError: a file is truncated, altered, missing or not of this package.
        StateMismatchError: the state is of another optimizer, format version or model.
    """
    if rank_files.are_in(folder):
        header = rank_files.load(optimizer, Path(folder), _check_content)
        _warn_of_changed_options(optimizer, header["hyperparameters"])
        return
    tensors, header = read_state(folder)
    _check_content(optimizer, tensors, header)
    load_flat_state(optimizer, tensors, header)
    _warn_of_changed_options(optimizer, header["hyperparameters"])


def read_state(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the verified tensors and the header of a checkpoint folder.

    Raises:
        DamagedCheckpointError: a file is truncated, altered, missing or not of this package.
        StateMismatchError: another format version.
    """
    parts = list(_verified_parts(Path(folder)))
    return {name: tensor for part, _ in parts for name, tensor in part.items()}, parts[0][1]


def read_contents(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the header, and shape, dtype and bytes of every tensor, none of which is read.

    Raises:
        DamagedCheckpointError: a file is truncated, missing or not of this package.
        StateMismatchError: another format version.
    """
    folder = Path(folder)
    if rank_files.are_in(folder):
        names = sorted(rank_files.file_names(folder))
    elif (folder / FILE_NAME).is_file():
        names = [FILE_NAME]
    else:
        names = sorted(_read_index(folder / INDEX_NAME))
    contents = [read_file_contents(folder / name) for name in names]
    return contents[0][0], {key: entry for _, part in contents for key, entry in part.items()}


def check_files(folder: str | os.PathLike[str]) -> None:
    """Reads and verifies all files of a checkpoint folder, one at a time, and keeps nothing.

    Raises:
        DamagedCheckpointError: a file is truncated, altered, missing or not of this package.
        StateMismatchError: another format version.
    """
    if rank_files.are_in(folder):
        rank_files.check(Path(folder))
        return
    for _ in _verified_parts(Path(folder)):
        pass


def _state_files(folder: Path) -> list[str]:
    patterns = (FILE_NAME, INDEX_NAME, _SHARDS, *rank_files.PATTERNS, ".optimizer*.tmp")
    return [path.name for pattern in patterns for path in folder.glob(pattern)]


def _verified_parts(folder: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Yields tensors and header of each file, compared with its checksum and with the index."""
    if (folder / FILE_NAME).is_file():
        tensors, header, _ = read_file(folder / FILE_NAME)
        yield tensors, header
        return
    for file_name, expected in _read_index(folder / INDEX_NAME).items():
        tensors, header, found = read_file(folder / file_name)
        if found != expected:
            raise DamagedCheckpointError(
                f"{folder / file_name} belongs to another save than {INDEX_NAME}"
            )
        yield tensors, header


def _read_index(path: Path) -> dict[str, str]:
    """Returns the digest of every shard by file name."""
    try:
        digests = json.loads(path.read_text())["metadata"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable index: {error}") from error
    if not isinstance(digests, dict) or not digests:
        raise DamagedCheckpointError(f"{path} names no files")
    foreign = [name for name in digests if not fnmatch(name, _SHARDS) or "/" in name]
    if foreign:
        raise DamagedCheckpointError(f"{path} names {foreign[0]!r}, which is no shard of a state")
    return digests


# --- what no checksum tells -----------------------------------------------------------------------


def _check_content(
    optimizer: PreconditionedOptimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Raises StateMismatchError for values of the right shape that nothing could go on with."""
    groups = header.get("param_groups")
    if not isinstance(header.get("hyperparameters"), dict) or not isinstance(groups, list):
        raise StateMismatchError("the header has no hyperparameters or no list of param_groups")
    for group in groups:
        _check_group(group, header.get("algorithm"))
    for name, tensor in tensors.items():
        # Neither NaN nor infinity has a fraction of zero.
        if name.endswith(".step") and not bool(((tensor >= 0) & (tensor.frac() == 0)).all()):
            raise StateMismatchError(f"{name!r} is no number of steps: {tensor.tolist()}")
    _check_dtypes(optimizer, tensors, header)


def _check_dtypes(
    optimizer: PreconditionedOptimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Raises StateMismatchError for dtypes that no option asks for; other options convert."""
    changed = _changed_options(optimizer, header["hyperparameters"])
    if not tensors or any(name.endswith("dtype") for name in changed):
        return
    names, ranks = optimizer.param_names, saved_ranks(optimizer, header)
    for index, key, meta in optimizer.state_layout(ranks):
        name = f"state.{names[index]}.{key}"
        if name in tensors and tensors[name].dtype != meta.dtype:
            raise StateMismatchError(
                f"dtype of {name!r}: expected {meta.dtype}, found {tensors[name].dtype}"
            )


def _check_group(group: Any, algorithm: Any) -> None:
    """Raises StateMismatchError unless a param group has what every group has."""
    fixed = {"algorithm": algorithm, "state_version": STATE_VERSION}
    missing = {"lr", "weight_decay", *fixed} - set(group if isinstance(group, dict) else ())
    if missing:
        raise StateMismatchError(f"a param group of the header lacks {sorted(missing)}")
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
            raise StateMismatchError(f"{name} = {value!r} of a param group is not a rate")
    for name, expected in fixed.items():
        if group[name] != expected:
            raise StateMismatchError(
                f"{name} of a param group: expected {expected!r}, found {group[name]!r}"
            )


def _changed_options(optimizer: PreconditionedOptimizer, saved: Mapping[str, Any]) -> list[str]:
    """Names of the options that are others than those a state was written under."""
    own = json.loads(json.dumps(optimizer.recipe.hyperparameters()))
    return [name for name, value in own.items() if name in saved and saved[name] != value]


def _warn_of_changed_options(optimizer: PreconditionedOptimizer, saved: Mapping[str, Any]) -> None:
    """Says which options are others than those the state was written under."""
    own = optimizer.recipe.hyperparameters()
    changed = [
        f"{name} was {saved[name]!r} and is {own[name]!r}"
        for name in _changed_options(optimizer, saved)
    ]
    if changed:
        logger.warning(
            "THE OPTIMIZER'S OPTIONS ARE NOT THOSE OF THE CHECKPOINT: %s. Its state is taken over, "
            "training goes on with the new options",
            "; ".join(changed),
        )
