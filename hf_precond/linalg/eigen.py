"""Symmetric eigendecompositions of stacked matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Below this many matrices per thread the hand-over costs more than it saves.
_MIN_PER_THREAD = 128
_ORTHOGONALITY_TOLERANCE = 1e-3
# Batched solvers of GPUs have returned wrong vectors without a word, and LAPACKs for CPUs NaN.
_RIGHT_IF_FINITE = frozenset({"cpu"})


class DecompositionError(ArithmeticError):
    """A factorisation failed, or gave a wrong answer, in float64 too."""


def eigh(a_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (ascending) ``[..., N]`` and eigenvectors ``[..., N, N]`` of symmetric
    matrices.

    A decomposition that fails, or whose vectors are not orthonormal, is repeated once in float64.

    Raises:
        DecompositionError: if float64 fails too.
    """
    try:
        values, vectors = _eigh_parallel(a_NN)
        if _is_right(values) and is_orthonormal(vectors):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(a_NN.double())
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"eigh of {tuple(a_NN.shape)} failed in float64: {error}"
        ) from error
    if not is_orthonormal(vectors):
        raise DecompositionError(
            f"eigh of {tuple(a_NN.shape)} gave vectors that are not orthonormal"
        )
    return values.to(a_NN.dtype), vectors.to(a_NN.dtype)


def eigvalsh(a_NN: Tensor) -> Tensor:
    """Returns eigenvalues (ascending) ``[..., N]`` of symmetric matrices, retried once in float64.

    Raises:
        DecompositionError: if float64 fails too.
    """
    try:
        values = torch.linalg.eigvalsh(a_NN)
        if _is_right(values):
            return values
    except torch.linalg.LinAlgError:
        pass
    try:
        values = torch.linalg.eigvalsh(a_NN.double())
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"eigvalsh of {tuple(a_NN.shape)} failed in float64: {error}"
        ) from error
    if not _is_right(values):
        raise DecompositionError(f"eigvalsh of {tuple(a_NN.shape)} gave values that are not finite")
    return values.to(a_NN.dtype)


def is_orthonormal(vectors: Tensor) -> bool:
    """Whether a solver's columns ``[..., N, K]`` are orthonormal; where its finite ones always are,
    whether they are finite."""
    if vectors.device.type in _RIGHT_IF_FINITE:
        return _is_right(vectors)
    gram = vectors.mT @ vectors
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return bool(gram.abs().max() <= _ORTHOGONALITY_TOLERANCE)


def _is_right(found: Tensor) -> bool:
    """Whether what a solver for CPUs has found is finite; elsewhere asking would be a host sync."""
    return found.device.type not in _RIGHT_IF_FINITE or bool(found.sum().isfinite())


def _eigh_parallel(a_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Batched eigh; on CPU the stack is split over threads, since LAPACK walks it serially."""
    stack = a_NN.reshape(-1, *a_NN.shape[-2:])
    threads = min(torch.get_num_threads(), stack.shape[0] // _MIN_PER_THREAD)
    if a_NN.device.type != "cpu" or threads < 2:
        return _eigh(a_NN)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_eigh, stack.chunk(threads)))
    values = torch.cat([part[0] for part in parts]).view(a_NN.shape[:-1])
    vectors = torch.cat([part[1] for part in parts]).view(a_NN.shape)
    return values, vectors


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor]:
    # Grad mode is per thread: off here as well where the caller's thread has it off.
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(stack)
    return values, vectors
