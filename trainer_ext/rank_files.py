"""Optimizer state as each rank has it: one file a rank, nothing gathered, any ranks may read it.

    optimizer-rank-00000-of-00004.safetensors ... and optimizer.ranks.json

A file is as in :mod:`trainer_ext.checkpoint`, but a part of a tensor has the place it belongs to in
its key, ``state.<parameter>.<tensor>@<groups>,<rows>,<columns>``, each a range ``first:last`` of
the view ``[G, M, B]``. The index, written last, has the header and the digest of every file.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_precond.optim.banks import parse_part_key
from hf_precond.optim.comm import Comm
from hf_precond.optim.flat_state import (
    StateMismatchError,
    check_header,
    load_states,
    saved_ranks,
    state_header,
)
from hf_precond.optim.global_state import StateTensor
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.views.plan import Extent
from trainer_ext.state_files import (
    DamagedCheckpointError,
    read_file,
    versions,
    write_atomically,
    write_file,
)

INDEX_NAME = "optimizer.ranks.json"
_FILES = "optimizer-rank-*-of-*.safetensors"
PATTERNS = (INDEX_NAME, _FILES)

CheckContent = Callable[[PreconditionedOptimizer, Mapping[str, Tensor], Mapping[str, Any]], None]


def are_in(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds state that ranks have written."""
    return (Path(folder) / INDEX_NAME).is_file()


def file_names(folder: Path) -> set[str]:
    """The files of all ranks, as the index names them.

    Raises:
        DamagedCheckpointError: the index cannot be read.
    """
    return set(_read_index(folder)[1])


def save(optimizer: PreconditionedOptimizer, folder: Path) -> set[str]:
    """Writes every rank's state and returns the names of all files; all ranks call this."""
    comm = optimizer.comm
    assert comm is not None, "asked for where ranks share the state"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    header = {**state_header(optimizer), "versions": versions()}
    name = f"optimizer-rank-{comm.rank:05d}-of-{comm.size:05d}.safetensors"
    written = None
    if comm.replicas is None or comm.replicas.is_first:
        text = json.dumps(header, sort_keys=True)
        written = name, write_file(folder / name, dict(_own_tensors(optimizer)), text)
    digests = dict(found for found in comm.gather_objects(written) if found)
    if comm.is_first:
        index = {"header": header, "sha256": digests}
        write_atomically(folder / INDEX_NAME, lambda path: path.write_text(json.dumps(index)))
    return {INDEX_NAME, *digests}


def load(
    optimizer: PreconditionedOptimizer, folder: Path, check_content: CheckContent
) -> dict[str, Any]:
    """Loads what :func:`save` wrote, on any number of ranks; all of them call this.

    Returns:
        the header.

    Raises:
        DamagedCheckpointError: a file is truncated, altered or missing.
        StateMismatchError: the state is of another optimizer, format version or model.
    """
    header, digests = _read_index(folder)
    check_header(optimizer, header)
    check_content(optimizer, {}, header)
    optimizer.lay_out()
    _check_shared(folder, digests, optimizer.comm)
    optimizer.lay_out(saved_ranks(optimizer, header))
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / name, framework="pt", device="cpu"))
            for name in sorted(digests)
        ]
        states = _States(optimizer, files)
        load_states(optimizer, states.collected(), header)
    return header


def check(folder: Path) -> None:
    """Verifies all files of a folder.

    Raises:
        DamagedCheckpointError: a file is truncated, altered or missing.
        StateMismatchError: another format version.
    """
    for name, digest in _read_index(folder)[1].items():
        _check_file(folder / name, digest)


def _own_tensors(optimizer: PreconditionedOptimizer) -> Iterator[tuple[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for name, param in zip(optimizer.param_names, params, strict=True):
        for key, value in optimizer.state[param].items():
            yield f"state.{name}.{key}", value


def _read_index(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text())
        header, digests = dict(index["header"]), dict(index["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable index: {error}") from error
    foreign = [name for name in digests if not fnmatch(str(name), _FILES) or "/" in str(name)]
    if foreign or not digests:
        raise DamagedCheckpointError(f"{path} names {(foreign or ['no files'])[0]!r}")
    return header, digests


def _check_shared(folder: Path, digests: Mapping[str, str], comm: Comm | None) -> None:
    """Verifies all files, each on one of the ranks; raises on all of them."""
    names = sorted(digests)
    mine = names if comm is None else names[comm.rank :: comm.size]
    problem = ""
    for name in mine:
        try:
            _check_file(folder / name, digests[name])
        except (DamagedCheckpointError, StateMismatchError) as error:
            problem = str(error)
    found = [problem] if comm is None else comm.gather_objects(problem)
    for problem in found:
        if problem:
            raise DamagedCheckpointError(problem)


def _check_file(path: Path, expected: str) -> None:
    _, _, found = read_file(path)
    if found != expected:
        raise DamagedCheckpointError(f"{path} belongs to another save than {INDEX_NAME}")


class _States:
    """Reads from the ranks' files what this rank needs, one whole tensor at a time."""

    def __init__(self, optimizer: PreconditionedOptimizer, files: list[Any]) -> None:
        self._optimizer = optimizer
        self._names = optimizer.param_names
        self._whole = {(t.piece.param, t.key): t for t in optimizer.state_tensors()}
        # Whole key -> the parts there are, each with the file and the key it has there.
        self._parts: dict[str, list[tuple[Extent | None, Any, str]]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118
                try:
                    whole, extent = parse_part_key(key)
                except ValueError as error:
                    raise StateMismatchError(f"{key!r} is no part of a state: {error}") from error
                self._parts[whole].append((extent, file, key))

    def collected(self) -> dict[int, dict[str, Tensor]]:
        """State of this rank by parameter index and key."""
        groups = self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        found: dict[int, dict[str, Tensor]] = {}
        for index, param in enumerate(params):
            last: tuple[str, Tensor] | None = None
            found[index] = {}
            for key in sorted(self._optimizer.state[param]):
                whole, extent = parse_part_key(key)
                exact = self._exact(index, whole, extent)
                if exact is None:
                    if last is None or last[0] != whole:
                        last = whole, self._assembled(index, whole)
                    exact = self._whole[index, whole].cut(last[1], extent).clone()
                found[index][key] = exact
        return found

    def _exact(self, index: int, key: str, extent: Extent | None) -> Tensor | None:
        """A part that some rank had just so."""
        for other, file, name in self._parts[f"state.{self._names[index]}.{key}"]:
            if other == extent:
                part: Tensor = file.get_tensor(name)
                return part
        return None

    def _assembled(self, index: int, key: str) -> Tensor:
        """A whole tensor from all its parts."""
        tensor: StateTensor = self._whole[index, key]
        parts = self._parts[f"state.{self._names[index]}.{key}"]
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
        covered = torch.zeros(tensor.shape, dtype=torch.bool)
        for extent, file, name in parts:
            part = file.get_tensor(name)
            place = tensor.cut(whole, extent)
            if part.numel() != place.numel():
                raise StateMismatchError(
                    f"{name!r}: expected {tuple(place.shape)}, found {tuple(part.shape)}"
                )
            place.copy_(part.reshape(place.shape))
            tensor.cut(covered, extent).fill_(True)
        if not bool(covered.all()):
            raise StateMismatchError(
                f"state of {self._names[index]!r}: parts of {key!r} are missing; were rank or "
                "other hyperparameters changed?"
            )
        return whole
