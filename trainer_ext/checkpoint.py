"""optimizer.safetensors: the optimizer's state, atomic, checksummed, never pickled.

One safetensors file, or shards with an index above ``max_shard_size``:

    optimizer.safetensors
    optimizer-00001-of-00003.safetensors ... and optimizer.safetensors.index.json

Tensors are keyed by parameter name (:mod:`hf_precond.optim.flat_state`). The metadata holds

    format    "pt"
    header    JSON text: format and package versions, optimizer, hyperparameters, groups, shapes
    sha256    hex digest of the header text, then for each tensor in the order of sorted names of
              "<name>\\0<dtype>\\0<comma-joined sizes>\\0" and its bytes, row-major

The index names the digest of each shard, so that shards of different saves cannot be mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import hf_precond
from hf_precond.optim.flat_state import (
    FORMAT_VERSION,
    StateMismatchError,
    flat_state,
    load_flat_state,
)
from hf_precond.optim.optimizer import PreconditionedOptimizer

FILE_NAME = "optimizer.safetensors"
INDEX_NAME = "optimizer.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
_PATTERN = "optimizer{suffix}.safetensors"


class DamagedCheckpointError(ValueError):
    """A file of the checkpoint is truncated, altered, incomplete or not written by this package."""


def save_optimizer(
    optimizer: PreconditionedOptimizer,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes the optimizer's state into ``folder``; a crash leaves the previous files whole.

    Args:
        max_shard_size: bytes, or text such as ``"5GB"``; a larger state is written in shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, header = flat_state(optimizer)
    text = json.dumps({**header, "versions": _versions()}, sort_keys=True)
    # On meta tensors the split sees sizes only: state tensors of one stack share their storage.
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()},
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    digests = {
        file_name: _write_file(folder / file_name, {name: tensors[name] for name in names}, text)
        for file_name, names in plan.filename_to_tensors.items()
    }
    written = set(digests)
    if plan.is_sharded:
        index = {"metadata": {"sha256": digests}, "weight_map": plan.tensor_to_filename}
        _write_atomically(
            folder / INDEX_NAME, lambda path: path.write_text(json.dumps(index, indent=2))
        )
        written.add(INDEX_NAME)
    for stale in set(_state_files(folder)) - written:
        (folder / stale).unlink()


def has_optimizer(folder: str | os.PathLike[str]) -> bool:
    """True if ``folder`` holds state written by :func:`save_optimizer`."""
    return (Path(folder) / FILE_NAME).is_file() or (Path(folder) / INDEX_NAME).is_file()


def load_optimizer(optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]) -> None:
    """Loads what :func:`save_optimizer` wrote, once all checks have passed.

    Raises:
        DamagedCheckpointError: a file is truncated, altered, missing or not of this package.
        StateMismatchError: the state is of another optimizer, format version or model.
    """
    tensors, header = read_state(folder)
    load_flat_state(optimizer, tensors, header)


def read_state(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the verified tensors and the header of a checkpoint folder.

    Raises:
        DamagedCheckpointError: a file is truncated, altered, missing or not of this package.
        StateMismatchError: another format version.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        tensors, header, _ = _read_file(folder / FILE_NAME)
        return tensors, header
    tensors, header = {}, {}
    for file_name, expected in _read_index(folder / INDEX_NAME).items():
        part, header, found = _read_file(folder / file_name)
        if found != expected:
            raise DamagedCheckpointError(
                f"{folder / file_name} belongs to another save than {INDEX_NAME}"
            )
        tensors.update(part)
    return tensors, header


def digest(tensors: Mapping[str, Tensor], header: str) -> str:
    """Returns the checksum defined on top of this module."""
    sha256 = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype, sizes = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
        sha256.update(f"{name}\0{dtype}\0{sizes}\0".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _versions() -> dict[str, str]:
    packages = (hf_precond, torch, safetensors, transformers)
    return {package.__name__: str(package.__version__) for package in packages}


def _state_files(folder: Path) -> list[str]:
    patterns = (FILE_NAME, INDEX_NAME, "optimizer-*-of-*.safetensors")
    return [path.name for pattern in patterns for path in folder.glob(pattern)]


def _write_file(path: Path, tensors: Mapping[str, Tensor], header: str) -> str:
    """Writes one file and returns its digest."""
    # safetensors refuses tensors that share storage, as the slices of one stack do.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    checksum = digest(own, header)
    metadata = {"format": "pt", "header": header, "sha256": checksum}
    _write_atomically(path, lambda temporary: save_file(own, temporary, metadata=metadata))
    return checksum


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns tensors, header and digest of one file, its digest compared with its content."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(
            f"{path} is truncated, altered or missing and cannot be read: {error}"
        ) from error
    if not {"header", "sha256"} <= set(metadata):
        raise DamagedCheckpointError(
            f"{path} was not written by this package: its metadata lacks the header"
        )
    header = _read_header(path, metadata["header"])
    if digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise DamagedCheckpointError(
            f"{path} was altered after it was written: its sha256 does not match"
        )
    return tensors, header, metadata["sha256"]


def _read_header(path: Path, text: str) -> dict[str, Any]:
    """Returns the header. Its version comes first: another may define the checksum otherwise."""
    try:
        header = json.loads(text)
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} has an unreadable header: {error}") from error
    if version != FORMAT_VERSION:
        raise StateMismatchError(
            f"{path} has format version {version!r}, this package reads {FORMAT_VERSION}"
        )
    return header


def _read_index(path: Path) -> dict[str, str]:
    """Returns the digest of every shard by file name."""
    try:
        digests = json.loads(path.read_text())["metadata"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable index: {error}") from error
    if not isinstance(digests, dict) or not digests:
        raise DamagedCheckpointError(f"{path} names no files")
    return digests
