"""Files of optimizer state: written atomically, checksummed, never pickled.

What they hold is defined in :mod:`trainer_ext.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import hf_precond
from hf_precond.optim.flat_state import FORMAT_VERSION, StateMismatchError

DTYPES_OF_FILES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""Types of numbers as safetensors calls them."""


class DamagedCheckpointError(ValueError):
    """A file of the checkpoint is truncated, altered, incomplete or not written by this package."""


def digest(tensors: Mapping[str, Tensor], header: str) -> str:
    """Returns the checksum defined in :mod:`trainer_ext.checkpoint`."""
    sha256 = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype, sizes = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
        sha256.update(f"{name}\0{dtype}\0{sizes}\0".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def versions() -> dict[str, str]:
    packages = (hf_precond, torch, safetensors, transformers)
    return {package.__name__: str(package.__version__) for package in packages}


def write_file(path: Path, tensors: Mapping[str, Tensor], header: str) -> str:
    """Writes one file and returns its digest."""
    # safetensors refuses tensors that share storage, as the slices of one stack do.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    checksum = digest(own, header)
    metadata = {"format": "pt", "header": header, "sha256": checksum}
    write_atomically(path, lambda temporary: save_file(own, temporary, metadata=metadata))
    return checksum


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
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


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
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


def read_file_contents(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the header of one file, and shape, dtype and bytes of its tensors, reading none.

    Raises:
        DamagedCheckpointError: the file is truncated, missing or not of this package.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            contents = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype = DTYPES_OF_FILES[part.get_dtype()]
                size = math.prod(part.get_shape()) * dtype.itemsize
                contents[name] = {
                    "shape": part.get_shape(),
                    "dtype": str(dtype).removeprefix("torch."),
                    "bytes": size,
                }
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(
            f"{path} is truncated, altered or missing and cannot be read: {error}"
        ) from error
    if "header" not in metadata:
        raise DamagedCheckpointError(
            f"{path} was not written by this package: its metadata lacks the header"
        )
    return _read_header(path, metadata["header"]), contents


def _read_header(path: Path, text: str) -> dict[str, Any]:
    """Returns the header. Its version comes first: another may define the checksum otherwise."""
    try:
        header = json.loads(text)
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} has an unreadable header: {error}") from error
    if version != FORMAT_VERSION:
        raise StateMismatchError(
            f"{path} has format version {version!r}, this package reads {FORMAT_VERSION}"
        )
    return header
