"""Shared-basis block low-rank Adagrad and Adam.

Yen, Duvvuri, Dhillon, Hsieh: Block Low-Rank Preconditioner with Shared Basis for Stochastic
Optimization (NeurIPS 2023), Algorithm 1; the exponentially averaged form is its appendix 6.9.

One group has m blocks of size b with second moments H_i. They are approximated by ``Q R_i Q^T +
rho_i I`` with one basis Q for all blocks, and the direction is ``(Q R_i Q^T + (rho_i + eps)
I)^(-1/2) g_i``.

    paper                    here
    B_t       (b x k)        basis          [G, B, K+p], the first K columns
    R_t^(i)   (k x k)        coef           [G, M, K, K], packed: [G, M, K(K+1)/2]
    rho_t^(i)                escaped_mass   [G, M]
    (R+cI)^(-1/2)-c^(-1/2)I  root           like coef
    c^(-1/2)                 root_tail      [G, M]

Nothing of size b x b is formed: A = sum_i M_i M_i^T, M_i = a Q R_i Q^T + c g_i g_i^T, is only ever
multiplied with a thin matrix, and everything else lives in k x k.

Deviations from the paper:

- the escaped mass uses a closed upper bound of ``||M_i - Q_t R_i Q_t^T||``
(``escaped_norm="block"``); the power
  iteration of the paper approaches the norm from below, which breaks the bound its Lemma 2 needs;
- ``escaped_norm="mean"`` adds the mean eigenvalue outside the basis instead, the isotropic tail
  that is closest to M_i. The bound adds what each turn of the basis moves over its edge, about the
  largest eigenvalue times the sine of the angle, at every update, and soon outweighs R_i. With the
  mean Lemma 2 does not hold;
- ``tail="diagonal"`` scales what is outside the basis per weight, (T_i + eps)^(-1/2) with T_i the
  second moments of g_i - Q Q^T g_i (state ``tail_sq`` [G, M, B]), as Adam would, instead of
  c_i^(-1/2);
- ``basis_from="moment"`` lets the basis follow the Gram matrix of what is to be preconditioned,
  with ``momentum_site="gradient"`` the averaged gradient, which is less noisy than A;
- ``pool`` takes, under the roots only, a share of every R_i from sum_j R_j, scaled to the trace of
  R_i: a block's own k x k matrix rests on the last 1 / (1 - beta2) gradients of one neuron, too
  few for its entries;
- the subspace iteration is shifted by a millionth of tr(A): no eigenvector changes, but a step
whose A has a
  rank below k no longer leaves the completion of the QR to chance;
- intervals: statistics and basis every ``update_interval`` steps, coefficients (basis fixed, no
deflation, the same
  bound for the escaped mass) every ``coef_interval``, roots every ``root_interval``. A root that is
  older than the basis is carried over by projection onto the new basis.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_precond.linalg.eigen import eigh, eigvalsh
from hf_precond.linalg.subspace import (
    cholesky_qr,
    extended_basis,
    random_basis,
    top_ritz_basis,
)
from hf_precond.linalg.symmetric import pack, packed_size, triangle, unpack
from hf_precond.preconditioners.base import (
    FromOneRank,
    NewState,
    OptimizerInfo,
    Rounds,
    Shape,
    Spectrum,
    SquaresTakenIn,
    State,
    StepContext,
    SumOverBlocks,
    alone,
    check_options,
    commit,
    option,
)
from hf_precond.preconditioners.shared_moments import (
    BasisTurn,
    Gram,
    Moments,
    block_norm_bound,
    matvec,
    nonzero,
    right_multiply,
    row_squares,
    trace,
)

Eigen = tuple[Tensor, Tensor]
_ACCUMULATED = ("coef", "escaped_mass", "tail_sq")
# A weight outside the basis is scaled by at most the tenfold of what its block's mean would give.
_TAIL_FLOOR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBasis:
    """Second moments of all blocks of a group in one shared low-rank basis."""

    exact_state: ClassVar[tuple[str, ...]] = ("basis",)

    rows_may_split: ClassVar[bool] = True

    rank: int = option(32, "columns of the shared basis", symbol="k", low=1, word="auto")
    num_iters: int = option(1, "subspace iterations per basis update", low=1)
    oversample: int = option(0, "extra columns iterated beside the basis", symbol="p", low=0)
    warm_start: bool = option(True, "start the iteration from the previous basis")
    deflate: bool = option(
        True, "move each block's smallest coefficient eigenvalue to the escaped mass"
    )
    escaped_norm: str = option(
        "block",
        "what the escaped mass gains: a closed upper bound of the norm of what the basis misses, "
        "that norm exactly (slow, for tests), or the mean eigenvalue outside the basis",
        choices=("block", "exact", "mean"),
    )
    tail: str = option(
        "isotropic",
        "scale of what is outside the basis: the escaped mass of the block (paper), or the second "
        "moment of each weight's own part",
        choices=("isotropic", "diagonal"),
    )
    basis_from: str = option(
        "second_moments",
        "what the basis follows: the second moments of all neurons (paper), or what is to be "
        "preconditioned, the momentum or gradient of the step",
        choices=("second_moments", "moment"),
    )
    update_interval: int = option(1, "steps between basis updates", low=1)
    coef_interval: int | None = option(
        None, "steps between coefficient updates (none: with the basis)", low=1
    )
    root_interval: int | None = option(
        None, "steps between inverse roots (none: whenever the coefficients change)", low=1
    )
    pool: float = option(
        0.0,
        "share of the group's common shape in each block's coefficients (1: blocks differ in size "
        "only)",
        low=0,
        high=1,
    )
    packed: bool = option(False, "store only the upper triangles of the coefficients and roots")
    max_rank_ratio: float = option(
        4.0,
        "the rank is cut so that the coefficients hold at most this many numbers per weight",
        low=0,
        low_open=True,
    )
    accumulate: str = option(
        "sum", "second moments as a sum or a moving average", choices=("sum", "ema")
    )
    beta2: float = option(
        0.999, "decay of the moving average", symbol="beta2", low=0, high=1, high_open=True
    )
    eps: float = option(
        1e-8, "added inside the inverse root", symbol="epsilon", low=0, low_open=True
    )
    seed: int = option(0, "seed of the first basis", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def effective_rank(self, shape: Shape) -> int:
        """Rank used for a view: k <= b and m k^2 <= max_rank_ratio * m b."""
        return self._rank(shape[2])

    def _rank(self, block_size: int) -> int:
        cap = isqrt(int(min(self.max_rank_ratio * block_size, block_size**2)))
        return max(1, min(self.rank, block_size, cap))

    @property
    def min_block_size(self) -> int:
        """Smallest block size at which the full rank is used."""
        return max(self.rank, ceil(self.rank**2 / self.max_rank_ratio))

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, blocks, size = shape
        rank = self._rank(size)
        width = min(rank + self.oversample, size)
        entries = (packed_size(rank),) if self.packed else (rank, rank)
        basis = random_basis(size, width, seed=self.seed, dtype=dtype, device=device)
        state = {
            "basis": basis.expand(groups, size, width).clone(),
            "coef": torch.zeros(groups, blocks, *entries, dtype=dtype, device=device),
            "escaped_mass": torch.zeros(groups, blocks, dtype=dtype, device=device),
            "root": torch.zeros(groups, blocks, *entries, dtype=dtype, device=device),
            "root_tail": torch.full((groups, blocks), self.eps**-0.5, dtype=dtype, device=device),
        }
        if self.tail == "diagonal":
            state["tail_sq"] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        commit(state, alone(self.update_in_rounds(state, g_GMB, ctx)))

    def update_in_rounds(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Rounds:
        """The update where other ranks may have more blocks of the same groups."""
        rank = self._rank(g_GMB.shape[-1])
        new, squares = State(), NewState()
        spectrum: Eigen | None = None
        changed = True
        if ctx.due(self.update_interval):
            new, squares, spectrum = yield from self._update_basis(state, g_GMB, rank, ctx)
        elif ctx.due(self.coef_interval or self.update_interval):
            if self._root_due(ctx, changed=True):
                # The roots' factorisation may fail and be repeated: nothing may count twice.
                new = {name: state[name].clone() for name in _ACCUMULATED if name in state}
            self._update_coef_({**state, **new}, g_GMB, rank)
        else:
            changed = False
        if self._root_due(ctx, changed=changed):
            new |= yield from self._root({**state, **new}, rank, spectrum)
        return {**new, **squares}

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        rank = self._rank(g_GMB.shape[-1])
        basis = state["basis"][..., :rank]
        inside = g_GMB @ basis
        projected = matvec(self._load(state["root"], rank), inside)
        tail_root = state["root_tail"].unsqueeze(-1)
        if self.tail == "isotropic":
            return (g_GMB * tail_root).baddbmm_(projected, basis.mT)
        scale = state["tail_sq"] + self.eps
        torch.maximum(scale, _TAIL_FLOOR / tail_root.square(), out=scale).rsqrt_()
        out = torch.baddbmm(g_GMB, inside, basis.mT, alpha=-1).mul_(scale)
        return out.baddbmm_(projected.addcmul_(inside, tail_root), basis.mT)

    def health(self, state: State) -> dict[str, Tensor]:
        """Share of the second moments' trace outside the shared basis, per group ``[G]``."""
        size = state["basis"].shape[-2]
        rank = self._rank(size)
        coef = self._load(state["coef"], rank)
        inside = trace(coef).sum(-1)
        outside = state["escaped_mass"].sum(-1) * size
        return {
            "escaped_mass_share": outside
            / (inside + outside).clamp(min=torch.finfo(coef.dtype).tiny)
        }

    # -- another rank -----------------------------------------------------------------------------

    def max_rank(self, shape: Shape) -> int:
        return replace(self, rank=shape[2]).effective_rank(shape)

    def sums_for_ranks(self, state: State, moment: Tensor | None) -> list[Tensor]:
        basis, size = state["basis"], state["basis"].shape[-2]
        rank = self._rank(size)
        coef = self._load(state["coef"], rank).sum(1)
        if moment is None:
            return [coef, coef, trace(coef) + state["escaped_mass"].sum(1) * (size - rank)]
        inside = moment @ basis[..., :rank]
        return [coef, inside.mT @ inside, moment.square().sum((-2, -1))]

    def turns_for_ranks(self, sums: Sequence[Tensor]) -> list[Tensor]:
        coef, second_moments, total = sums
        vectors = eigh(coef)[1].flip(-1)
        values = (vectors * (second_moments @ vectors)).sum(-2).clamp(min=0)
        return [values, vectors, total]

    def spectra(self, turns: Sequence[Tensor], shape: Shape) -> list[list[Spectrum]]:
        values, _, total = turns
        num_outside = shape[2] - values.shape[-1]
        outside = (total - values.sum(-1)).clamp(min=0)
        total = nonzero(values.sum(-1) + outside)
        inside = values / total.unsqueeze(-1)
        shares = zip(inside.tolist(), (outside / total).tolist(), strict=True)
        return [[Spectrum(tuple(columns), rest, num_outside)] for columns, rest in shares]

    def resized(self, state: State, turns: Sequence[Tensor], rank: int) -> State:
        """See :class:`RankAdaptive`. H_i stays as it is under a larger rank. Under a smaller one
        its part outside of the smaller basis goes to the escaped mass: with ``escaped_norm="mean"``
        the trace stays, else a bound of its norm is added."""
        size = state["basis"].shape[-2]
        old, new = self._rank(size), replace(self, rank=rank)._rank(size)
        width = min(new + self.oversample, size)
        if new == old:
            return dict(state)
        coef, root = (self._load(state[name], old) for name in ("coef", "root"))
        if new > old:
            # What is iterated beside the basis begins the new columns.
            pad = (0, new - old, 0, new - old)
            basis = state["basis"][..., :width]
            more = {"coef": self._store(F.pad(coef, pad)), "root": self._store(F.pad(root, pad))}
            if basis.shape[-1] < width:
                basis = extended_basis(basis, width, seed=self.seed + new)
            return {**state, **more, "basis": basis}
        vectors = turns[1]
        coef, root = (right_multiply(right_multiply(x, vectors).mT, vectors) for x in (coef, root))
        basis = torch.cat([state["basis"][..., :old] @ vectors, state["basis"][..., old:]], -1)
        kept, rest = slice(None, new), slice(new, None)
        found = {
            **state,
            "basis": basis[..., :width],
            "coef": self._store(coef[..., kept, kept]),
            "root": self._store(root[..., kept, kept]),
            "escaped_mass": self._escaped_with(
                state["escaped_mass"], coef[..., rest, rest], coef[..., rest, kept], size
            ),
        }
        if self.tail == "diagonal":
            found["tail_sq"] = state["tail_sq"].clone()
            columns = basis[..., new:old]
            for index in range(old - new):  # at once it would be [G, M, B, old - new]
                row = coef[..., rest, new + index] @ columns.mT
                found["tail_sq"].addcmul_(row, columns[..., index].unsqueeze(1))
        return found

    def _escaped_with(self, escaped_mass: Tensor, rest: Tensor, off: Tensor, size: int) -> Tensor:
        """The escaped mass once the coefficients' blocks ``rest`` and ``off`` are given up."""
        old, new = rest.shape[-1] + off.shape[-1], off.shape[-1]
        if self.escaped_norm == "mean":
            return (escaped_mass * (size - old) + trace(rest)) / (size - new)
        norms = (x.flatten(-2).norm(dim=-1) for x in (rest, off))
        return escaped_mass + block_norm_bound(torch.zeros_like(escaped_mass), *norms)

    # -- one update -------------------------------------------------------------------------------

    @property
    def _weights(self) -> tuple[float, float]:
        """(a, c) of H <- a H + c g g^T."""
        return (1.0, 1.0) if self.accumulate == "sum" else (self.beta2, 1.0 - self.beta2)

    def _load(self, stored: Tensor, rank: int) -> Tensor:
        return unpack(stored, rank) if self.packed else stored

    def _store(self, full: Tensor) -> Tensor:
        return pack(full) if self.packed else full

    def _root_due(self, ctx: StepContext, *, changed: bool) -> bool:
        return changed if self.root_interval is None else ctx.due(self.root_interval)

    def _update_basis(
        self, state: State, g_GMB: Tensor, rank: int, ctx: StepContext
    ) -> Generator[Any, tuple[Tensor, ...], tuple[State, NewState, Eigen | None]]:
        """One basis update: the new state, what squares to take in, and the spectrum of the new
        coefficients if it was needed."""
        decay, weight = self._weights
        coef = self._load(state["coef"], rank)
        norm_sq = row_squares(g_GMB)
        # A is of fourth order in the gradient: without a common scale float32 over- and underflows.
        mass = decay * trace(coef).sum(-1) + weight * norm_sq.sum(-1)
        (mass,) = yield SumOverBlocks((mass,))
        scale_G = nonzero(mass)
        scale_GM = scale_G.unsqueeze(-1)
        moments = Moments.of(
            basis=state["basis"][..., :rank],
            coef=coef / scale_GM[..., None, None],
            g=g_GMB,
            scale=scale_G[:, None, None],
            norm_sq=norm_sq / scale_GM,
            decay=decay,
            weight=weight,
        )
        columns = yield from self._iterate(state["basis"], moments, g_GMB, ctx)
        turn = BasisTurn.of(moments, columns[..., :rank])
        coef = turn.coef()
        wanted = self.pool == 0 and self._root_due(ctx, changed=True)
        spectrum = eigh(coef) if wanted else None
        lowest = self._lowest(coef, spectrum)
        if self.deflate:
            (lowest,) = yield FromOneRank((lowest,), per_block=True)
        if self.escaped_norm == "mean":
            norm = lowest + turn.mean_residual()
        elif self.escaped_norm == "block":
            norm = turn.block_norm(lowest)
        else:
            (norm,) = yield FromOneRank((turn.exact_norm(coef, lowest),), per_block=True)
        coef.diagonal(dim1=-2, dim2=-1).sub_(lowest.unsqueeze(-1))
        new = {
            "basis": columns,
            "coef": self._store(coef.mul_(scale_GM[..., None, None])),
            "escaped_mass": decay * state["escaped_mass"] + norm * scale_GM,
        }
        squares = NewState()
        if self.tail == "diagonal":
            squares["tail_sq"] = SquaresTakenIn(x=turn.residual, decay=decay, weight=weight)
        if not self._root_due(ctx, changed=True):
            new["root"] = self._store(turn.carry_over(self._load(state["root"], rank)))
        if spectrum is None:
            return new, squares, None
        values = (spectrum[0] - lowest.unsqueeze(-1)).clamp_(min=0) * scale_GM.unsqueeze(-1)
        return new, squares, (values, spectrum[1])

    def _update_coef_(self, state: State, g_GMB: Tensor, rank: int) -> None:
        """One rank-one update per block in the present basis, in place."""
        decay, weight = self._weights
        basis = state["basis"][..., :rank]
        inside = g_GMB @ basis
        # The residual itself: |g|^2 - |y|^2 cancels where the basis has settled.
        residual = torch.baddbmm(g_GMB, inside, basis.mT, alpha=-1)
        outside_sq = row_squares(residual)
        if self.escaped_norm == "mean":
            norm = weight * outside_sq / max(1, g_GMB.shape[-1] - rank)
        else:
            norm = block_norm_bound(
                torch.zeros_like(outside_sq),
                weight * outside_sq,
                weight * outside_sq.sqrt() * torch.linalg.vector_norm(inside, dim=-1),
            )
        left, right = inside.unsqueeze(-1), inside.unsqueeze(-2)
        if self.packed:
            rows, columns = triangle(rank, inside.device)
            left, right = inside[..., rows], inside[..., columns]
        state["coef"].mul_(decay).addcmul_(left, right, value=weight)
        state["escaped_mass"].mul_(decay).add_(norm)
        if self.tail == "diagonal":
            state["tail_sq"].mul_(decay).addcmul_(residual, residual, value=weight)

    def _iterate(
        self, columns: Tensor, moments: Moments, g_GMB: Tensor, ctx: StepContext
    ) -> Generator[Any, tuple[Tensor, ...], Tensor]:
        """Subspace iteration on what the basis follows, A = sum_i M_i M_i^T or X^T X, from the
        previous (or a fresh random) basis."""
        rank = moments.basis.shape[-1]
        a: Moments | Gram = moments
        # From the previous basis itself the first product with the gradients is there already.
        projected = moments.x if self.warm_start and columns.shape[-1] == rank else None
        if self.basis_from == "moment":
            a, projected = Gram(g_GMB if ctx.moment is None else ctx.moment), None
        if not self.warm_start:
            # The seed of the step is mixed in so that every update draws anew.
            columns = random_basis(
                *columns.shape[-2:],
                seed=self.seed + 1_000_003 * ctx.step,
                dtype=columns.dtype,
                device=columns.device,
            ).expand_as(columns)
        trace_A = a.trace()
        for number in range(self.num_iters):
            product = a.times(columns, projected)
            if number == 0:
                product, trace_A = yield SumOverBlocks((product, trace_A))
            else:
                (product,) = yield SumOverBlocks((product,))
            shift = 1e-8 if columns.dtype == torch.float64 else 1e-6
            keep = (trace_A == 0)[:, None, None]
            product = product / nonzero(trace_A)[:, None, None] + shift * columns
            columns, projected = torch.where(keep, columns, cholesky_qr(product)), None
        if columns.shape[-1] > rank:
            (product,) = yield SumOverBlocks((a.times(columns),))
            columns = torch.where(keep, columns, top_ritz_basis(columns, product))
        (columns,) = yield FromOneRank((columns,))
        return columns

    def _lowest(self, coef: Tensor, spectrum: Eigen | None) -> Tensor:
        """The eigenvalue ``[G, M]`` that deflation moves to the escaped mass."""
        if not self.deflate:
            return torch.zeros(coef.shape[:2], dtype=coef.dtype, device=coef.device)
        values = spectrum[0] if spectrum is not None else eigvalsh(coef)
        return values[..., 0].clamp(min=0)

    def _root(
        self, state: State, rank: int, spectrum: Eigen | None
    ) -> Generator[Any, tuple[Tensor, ...], State]:
        """(R_i + c_i I)^(-1/2) - c_i^(-1/2) I and c_i^(-1/2), c_i = rho_i + eps."""
        if spectrum is None:
            spectrum = yield from self._spectrum(self._load(state["coef"], rank))
        values, vectors = spectrum
        values = values.clamp(min=0)
        tail = state["escaped_mass"] + self.eps
        if values.dtype != torch.float64:
            # Below this the difference of the two roots is rounding noise.
            tail = torch.maximum(tail, 1e-6 * values[..., -1])
        tail_root = tail.rsqrt()
        weights = (values + tail.unsqueeze(-1)).rsqrt() - tail_root.unsqueeze(-1)
        root = self._store((vectors * weights.unsqueeze(-2)) @ vectors.mT)
        root, tail_root = yield FromOneRank((root, tail_root), per_block=True)
        return {"root": root, "root_tail": tail_root}

    def _spectrum(self, coef: Tensor) -> Generator[Any, tuple[Tensor, ...], Eigen]:
        """Eigenvalues ``[G, M, K]`` and vectors of the coefficients, pooled over the blocks."""
        if self.pool == 0:
            return eigh(coef)
        (total,) = yield SumOverBlocks((coef.sum(1, keepdim=True),))
        size = trace(coef) / nonzero(trace(total))
        if self.pool == 1:
            # One decomposition a group: all blocks have its vectors.
            values, vectors = eigh(total)
            return values * size.unsqueeze(-1), vectors.expand_as(coef)
        return eigh(torch.lerp(coef, total * size[..., None, None], self.pool))


_PAPER = "Yen et al., Block Low-Rank Preconditioner with Shared Basis, NeurIPS 2023"

# What trained language models best at AdamW-like cost (docs/shared_basis.md has the measurements);
# the dataclass's own defaults are the paper's.
_DEFAULTS = {
    "rank": 16,
    "update_interval": 1,
    "root_interval": 10,
    "deflate": False,
    "escaped_norm": "mean",
    "tail": "diagonal",
    "eps": 1e-12,
    "graft": "adam",
    "momentum_site": "gradient",
    # Until the second roots: the first ones know one gradient and stretch whatever it is not.
    "start_step": 11,
}

INFOS = (
    OptimizerInfo(
        name="shared_basis_adagrad",
        algorithm=SharedBasis,
        fixed={"accumulate": "sum"},
        defaults=_DEFAULTS,
        summary="Adagrad with per-neuron second moments in one low-rank basis per layer or head",
        formula=(
            "H_i = B R_i B^T + r_i (I - B B^T) for every output neuron i of a kernel, with one "
            "basis B [n, k] for all of them: B follows the largest eigenvectors of the sum of "
            "g_i g_i^T, R_i sums B^T g_i g_i^T B, r_i what escapes. The direction is H_i^(-1/2) "
            "g_i, at the length of an Adam step."
        ),
        paper=f"{_PAPER}, Algorithm 1",
    ),
    OptimizerInfo(
        name="shared_basis_adam",
        algorithm=SharedBasis,
        fixed={"accumulate": "ema"},
        defaults=_DEFAULTS,
        summary="the same with exponentially averaged second moments",
        formula=(
            "As shared_basis_adagrad, with moving averages in place of sums: R_i <- beta2 R_i + "
            "(1 - beta2) B^T g_i g_i^T B."
        ),
        paper=f"{_PAPER}, appendix 6.9",
    ),
)
