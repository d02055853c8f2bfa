"""What the papers plot to see whether a method fits a model, as pure functions of gradients.

Shapes: ``g_TGMB`` are T gradients of one kernel read as G groups of M blocks of size B, ``g_TOI``
the same kernel as a matrix of O outputs and I inputs. Second moments are sums over the T steps:
H_i = sum_t g_t,i g_t,i^T for block i. No matrix over the weights of a kernel is formed except for
the few that a picture shows: H_i = G_i^T G_i has the spectrum of the T x T Gram matrix G_i G_i^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_precond.preconditioners.base import State, StepContext
from hf_precond.preconditioners.shared_basis import SharedBasis
from hf_precond.preconditioners.shared_moments import (
    BasisTurn,
    Moments,
    nonzero,
    row_squares,
    trace,
)

Errors = dict[int, float]
"""Rank -> relative error, ``sum_i ||H_i - X_i||_F^2 / sum_i ||H_i||_F^2``."""


# --- approximation errors: paper 001, appendix 6.3, Figure 5 --------------------------------------


def shared_errors(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """One basis for all blocks of a group: the top eigenvectors of sum_i H_i^2."""
    g_GMTB = _by_block(g_TGMB)
    weighted = (_grams(g_GMTB) @ g_GMTB).flatten(1, 2)
    squares = g_GMTB.flatten(1, 2).mT @ weighted  # sum_i H_i^2, [G, B, B]
    basis = torch.linalg.eigh((squares + squares.mT) / 2).eigenvectors.flip(-1)
    total = _sum_of_squares(_grams(g_GMTB))
    return {
        rank: _rest(_sum_of_squares(_grams(g_GMTB @ basis[:, None, :, :rank])), total)
        for rank in ranks
    }


def shared_trace_missed(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """Share of the trace, sum_i tr(H_i), outside of the best basis for it.

    The squares of the relative error are mostly those of the few largest eigenvalues; the trace
    counts the many small ones, too, which an inverse root makes large.
    """
    rows = _by_block(g_TGMB).flatten(1, 2)
    values = torch.linalg.eigvalsh(rows.mT @ rows).flip(-1).clamp(min=0)
    total = nonzero(values.sum())
    return {rank: float(values[..., rank:].sum() / total) for rank in ranks}


def separate_errors(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """A basis for each block: the best approximation of rank k there is."""
    squares = torch.linalg.eigvalsh(_grams(_by_block(g_TGMB))).flip(-1).square()
    total = nonzero(squares.sum())
    return {rank: float(squares[..., rank:].sum() / total) for rank in ranks}


def online_errors(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """One basis for all blocks, one gradient after the other: what Algorithm 1 holds at the end."""
    g_GMTB = _by_block(g_TGMB)
    errors = {}
    for rank in ranks:
        algorithm, state = _new_run(g_TGMB, rank, escaped_norm="block")
        for step, g_GMB in enumerate(g_TGMB.double(), start=1):
            algorithm.update(state, g_GMB, _context(step, g_GMB))
        basis = state["basis"][..., : state["coef"].shape[-1]]
        errors[rank] = _error_of(g_GMTB, g_GMTB @ basis.unsqueeze(1), state["coef"])
    return errors


def frequent_directions_errors(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """A sketch for each block by frequent directions, one gradient after the other."""
    # In coordinates of the span of a block's T gradients nothing changes but the cost.
    values, vectors = torch.linalg.eigh(_grams(_by_block(g_TGMB)))
    x_GMTT = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    errors = {}
    for rank in ranks:
        sketch = _sketch(x_GMTT, rank)
        inside = sketch.mT @ sketch
        errors[rank] = _error_of(x_GMTT, x_GMTT, inside)
    return errors


def block_diagonal_errors(g_TGMB: Tensor, ranks: Sequence[int]) -> Errors:
    """The k x k blocks along the diagonal of each H_i; k = 1 is the diagonal that Adam keeps."""
    g_GMTB = _by_block(g_TGMB)
    steps, size = g_GMTB.shape[-2:]
    total = _sum_of_squares(_grams(g_GMTB))
    errors = {}
    for rank in ranks:
        tiles = F.pad(g_GMTB, (0, -size % rank)).unflatten(-1, (-1, rank)).movedim(-2, 2)
        grams = _grams(tiles) if steps < rank else _grams(tiles.mT)
        errors[rank] = _rest(_sum_of_squares(grams), total)
    return errors


def _by_block(g_TGMB: Tensor) -> Tensor:
    """``[G, M, T, B]`` in float64."""
    return g_TGMB.double().permute(1, 2, 0, 3)


def _grams(x: Tensor) -> Tensor:
    """x x^T of matrices; its norm is that of x^T x."""
    return x @ x.mT


def _sum_of_squares(x: Tensor) -> Tensor:
    """Of all entries; one where all are zero."""
    return nonzero(x.square().sum())


def _rest(kept: Tensor, total: Tensor) -> float:
    """What a part leaves of the whole, as a share; rounding makes it no less than nothing."""
    return float((1 - kept / total).clamp(min=0))


def _error_of(g_GMTB: Tensor, inside_GMTK: Tensor, coef_GMKK: Tensor) -> float:
    """Error of Q R_i Q^T, from G_i Q and R_i."""
    mixed = ((inside_GMTK @ coef_GMKK) * inside_GMTK).sum()
    total = _sum_of_squares(_grams(g_GMTB))
    return float((total - 2 * mixed + coef_GMKK.square().sum()).clamp(min=0) / total)


def _sketch(x_GMTB: Tensor, rank: int) -> Tensor:
    """Frequent directions of T rows for each block: sketches of at most ``rank`` rows."""
    groups, blocks, steps, size = x_GMTB.shape
    kept = min(rank, size)
    sketch = x_GMTB.new_zeros(groups, blocks, kept, size)
    for step in range(steps):
        rows = torch.cat([sketch, x_GMTB[:, :, step : step + 1]], 2)
        _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
        values = sigma.square()
        # With as many rows as there are dimensions nothing has to be taken off.
        lost = values[..., rank - 1 : rank] if rank < size else torch.zeros_like(values[..., :1])
        values = (values - lost).clamp(min=0)[..., :kept]
        sketch = values.sqrt().unsqueeze(-1) * right[..., :kept, :]
    return sketch


# --- the algorithm as it runs: escaped mass, and Q_T of paper 001, appendix 6.8 -------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBasisRun:
    """What Algorithm 1 says of itself after each step.

    Attributes:
        escaped: share of the trace in the escaped mass.
        alignment: mean over blocks of Q_T (equation 20): 1 where all blocks have the same leading
            eigenvectors. Theorem 3 bounds the escaped mass by it.
    """

    escaped: list[float]
    alignment: list[float]


def run_shared_basis(g_TGMB: Tensor, rank: int) -> SharedBasisRun:
    """Runs Algorithm 1, with the exact norm of what escapes, over a sequence of gradients."""
    algorithm, state = _new_run(g_TGMB, rank, escaped_norm="exact")
    rank = state["coef"].shape[-1]
    deflated = g_TGMB.new_zeros(g_TGMB.shape[1:3], dtype=torch.float64)
    lost = torch.zeros_like(deflated)
    escaped, alignment = [], []
    for step, g_GMB in enumerate(g_TGMB.double(), start=1):
        moments = _moments(state["basis"], state["coef"], g_GMB)
        algorithm.update(state, g_GMB, _context(step, g_GMB))
        turn = BasisTurn.of(moments, state["basis"])
        kept = turn.coef()
        deflated += (trace(kept) - trace(state["coef"])).clamp(min=0) / rank
        lost += turn.exact_norm(kept, torch.zeros_like(lost))
        share = torch.where(deflated + lost > 0, deflated / nonzero(deflated + lost), 1.0)
        alignment.append(float(share.mean()))
        escaped.append(float(algorithm.health(state)["escaped_mass_share"].mean()))
    return SharedBasisRun(escaped=escaped, alignment=alignment)


def _new_run(g_TGMB: Tensor, rank: int, **options: Any) -> tuple[SharedBasis, State]:
    """The paper's algorithm at exactly this rank (or the block size), and its first state."""
    size = g_TGMB.shape[-1]
    rank = min(rank, size)
    algorithm = SharedBasis(rank=rank, max_rank_ratio=float(rank * rank), **options)
    shape = g_TGMB.shape[1], g_TGMB.shape[2], size
    return algorithm, algorithm.init(shape, dtype=torch.float64, device=g_TGMB.device)


def _context(step: int, g_GMB: Tensor) -> StepContext:
    return StepContext(step=step, phases=[0.0] * len(g_GMB))


def _moments(basis: Tensor, coef: Tensor, g_GMB: Tensor) -> Moments:
    return Moments.of(
        basis=basis.clone(),
        coef=coef.clone(),
        g=g_GMB,
        scale=g_GMB.new_ones(len(g_GMB), 1, 1),
        norm_sq=row_squares(g_GMB),
        decay=1.0,
        weight=1.0,
    )


# --- structure of the second moments: paper 001, Figure 1 and appendix 6.2 ------------------------


def second_moment_image(g_TOI: Tensor, *, tile: int = 8, cap: float = 0.99) -> Tensor:
    """The second moments of a few weights as a picture, weights of an output side by side.

    As in appendix 6.2: squares of the entries, the largest percent cut off, means over tiles. Of
    the transposed gradients it is the ordering by inputs.

    Returns:
        ``[O I / tile, O I / tile]`` between 0 and 1.
    """
    flat = g_TOI.double().flatten(1)
    squares = (flat.mT @ flat).square()
    limit = torch.quantile(squares.flatten()[: 2**24 - 1], cap)
    if limit > 0:
        squares = squares.clamp(max=float(limit)) / limit
    return F.avg_pool2d(squares[None], tile)[0]


def block_share(g_TOI: Tensor) -> float:
    """Share of ``||H||_F^2`` inside the diagonal blocks of the outputs, per share of the entries.

    1 where the blocks are like all other entries, O at most: nothing outside of them.
    """
    g_OTI = g_TOI.double().movedim(1, 0)
    flat = g_TOI.double().flatten(1)
    inside = (g_OTI @ g_OTI.mT).square().sum()
    return float(inside / nonzero((flat @ flat.mT).square().sum()) * g_TOI.shape[1])


# --- what a layer sees: paper 001, Figure 2 -------------------------------------------------------


def singular_values(x_NF: Tensor) -> Tensor:
    """Singular values of a layer's inputs, descending, as shares of their sum."""
    values = torch.linalg.svdvals(x_NF.double())
    return values / nonzero(values.sum())


def rank_holding(shares: Tensor, part: float = 0.8) -> int:
    """The smallest number of leading values whose sum is ``part`` of all.

    >>> rank_holding(torch.tensor([0.5, 0.25, 0.25]), 0.8)
    3
    """
    held = shares.cumsum(0) / nonzero(shares.sum())
    return min(int((held < part - 1e-12).sum()) + 1, len(shares))


# --- rotations: paper 003, Figures 1 and 9 --------------------------------------------------------


def off_diagonal(g_TN: Tensor) -> Tensor:
    """Off-diagonal entries of the second moments of N weights, in units of their mean diagonal."""
    moments = g_TN.double().mT @ g_TN.double()
    size = len(moments)
    scale = nonzero(trace(moments) / size)
    apart = ~torch.eye(size, dtype=torch.bool, device=moments.device)
    return moments[apart] / scale


def off_diagonal_share(g_TN: Tensor) -> float:
    """Share of ``||C||_F^2`` off the diagonal: what a second moment for each weight misses."""
    moments = (g_TN.double().mT @ g_TN.double()).square()
    return float(1 - trace(moments) / nonzero(moments.sum()))
