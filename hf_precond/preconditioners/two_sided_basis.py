"""Two-sided shared bases: Adam in a low-rank rotation, and Adam as it is outside.

All neurons of a layer see the same inputs and are seen by the same next layers, so their gradients
share a few directions on either side (Yen et al. 2023 use the first fact). Two thin orthonormal
bases, P for outputs and Q for inputs, cut a matrix into four parts without rest:

    G = P C Q^T + P O + I Q^T + E        C = P^T G Q, O = P^T G - C Q^T, I = G Q - P C

and each part has Adam's second moment in its own coordinates. So the few directions that matter are
scaled one by one, as in SOAP, and what is left per weight, as in Adam, at the cost of thin products
and, with small bases, of the memory of Adam. Bases of unit vectors leave Adam; full rank is Adam in
the bases.

Scaled per weight, E is mostly noise of one size, whose singular values grow with the root of the
matrix's sides and soon outweigh C, whose directions have about one each. So E is brought down to
``tail_ratio`` times the size of C, both as root mean squares over singular values: as in Muon, no
direction counts for much more than another.

    P    out_basis [G, M, L]        Q    in_basis [G, B, K]      L = min(k, M), K = min(k, B)
    C^2  core_sq   [G, L, K]        O^2  out_sq   [G, L, B]
    I^2  in_sq     [G, M, K]        E^2  tail_sq  [G, M, B]

k is ``rank``, or a quarter of the smaller side and no less than 32: what is worth a direction of
its own grows with the width (docs/two_sided_basis.md).

The bases follow the singular vectors of what is to be preconditioned, with momentum before the
preconditioner (``momentum_site="gradient"``) the averaged gradient M: one step of orthogonal
iteration, P <- qr(M Q), Q <- qr(M^T P), at every ``update_interval``. Bases of an average of
G^T G, which change more slowly, train worse (docs/two_sided_basis.md). The second moments are those
of the gradient itself and are carried over unturned, as in SOAP.

Of our own: no paper has it. Where it meets Adam and a rotated Adam the tests hold it to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.fused import fused
from hf_precond.linalg.norms import group_squares
from hf_precond.linalg.subspace import extended_basis, random_basis, singular_iteration
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
    alone,
    check_options,
    commit,
    option,
)
from hf_precond.preconditioners.shared_moments import nonzero

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
_SQUARES = ("core_sq", "out_sq", "in_sq", "tail_sq")
# Where no rank is given: this part of the smaller side, and no less than that many columns.
_PART_OF_SIDE = 4
_LEAST_RANK = 32
# Of the mean square of the gradient: what is below may be rounding, not to be brought to one.
_NOISE = 1e-8
# Of the tail: what is divided by it stays in the range of float32.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedBasis:
    """Adam's second moments in low-rank bases of both sides and outside of them."""

    exact_state: ClassVar[tuple[str, ...]] = ("in_basis", "out_basis")

    rank: int | None = option(
        None,
        "columns of each basis, at most those of its side (none: a quarter of each matrix's "
        "smaller side, and no less than 32)",
        low=1,
        word="auto",
    )
    update_interval: int = option(1, "steps between updates of the bases", low=1)
    update_rms: float | None = option(
        0.2,
        "root mean square of every group's direction, AdamW's by rule of thumb (none: as it comes)",
        low=0,
        low_open=True,
    )
    tail_ratio: float | None = option(
        1.5,
        "size of the directions outside of the bases, at most, of that of those inside of both "
        "(none: each weight as in Adam)",
        low=0,
        low_open=True,
    )
    beta2: float = option(0.999, "decay of the second moments", low=0, high=1, high_open=True)
    eps: float = option(
        1e-8,
        "added to the roots of the second moments",
        symbol="epsilon",
        low=0,
        low_open=True,
    )
    seed: int = option(0, "seed of the first bases", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        out, into = (min(self.effective_rank(shape), side) for side in (rows, columns))
        state: State = {}
        sides = ("out_basis", rows, out, self.seed), ("in_basis", columns, into, self.seed + 1)
        for name, size, rank, seed in sides:
            basis = random_basis(size, rank, seed=seed, dtype=dtype, device=device)
            state[name] = basis.expand(groups, size, rank).clone()
        shapes = (out, into), (out, columns), (rows, into), (rows, columns)
        for name, of_part in zip(_SQUARES, shapes, strict=True):
            state[name] = torch.zeros(groups, *of_part, dtype=dtype, device=device)
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        commit(state, alone(self.update_in_rounds(state, g_GMB, ctx)))

    def update_in_rounds(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Rounds:
        """The update where other ranks do the same: the bases are taken from one."""
        new = NewState()
        out_basis, in_basis = state["out_basis"], state["in_basis"]
        if ctx.due(self.update_interval):
            followed = g_GMB if ctx.moment is None else ctx.moment
            out_basis, in_basis = yield FromOneRank(
                singular_iteration(followed, out_basis, in_basis)
            )
            new = NewState(out_basis=out_basis, in_basis=in_basis)
        for name, part in zip(_SQUARES, _split(g_GMB, out_basis, in_basis), strict=True):
            new[name] = SquaresTakenIn(x=part, decay=self.beta2, weight=1 - self.beta2)
        return new

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        correction = (1 - self.beta2**ctx.step) ** 0.5
        floor, eps = _noise(state), self.eps * correction
        out_basis, in_basis = state["out_basis"], state["in_basis"]
        parts = _split(g_GMB, out_basis, in_basis)
        for name, part in zip(_SQUARES, parts, strict=True):
            _scale_(part, state[name], floor, eps)
        core, out, into, direction = parts
        share = self._share_of_tail(core, direction)
        out.baddbmm_(core, in_basis.mT)
        # In units of the tail's share: what is thin is divided, and the whole multiplied at last.
        out, into = out / share, into / share
        direction.baddbmm_(*_side_by_side(out_basis, out, into, in_basis))
        if self.update_rms is None:
            return direction.mul_(share * correction)
        norm = group_squares(direction).sqrt()[:, None, None]
        return direction.mul_(self.update_rms * direction[0].numel() ** 0.5 / nonzero(norm))

    def _share_of_tail(self, core: Tensor, tail: Tensor) -> Tensor:
        """What the tail is multiplied by, in (0, 1], ``[G, 1, 1]``.

        Never enlarged: a tail of rounding alone stays one.
        """
        if self.tail_ratio is None:
            return core.new_ones(())
        inside = min(core.shape[-2:])
        outside = max(1, min(tail.shape[-2:]) - inside)
        squares = group_squares(core) / inside, group_squares(tail) / outside
        ratio = self.tail_ratio * (squares[0] / nonzero(squares[1])).sqrt()
        # Nothing inside leaves the tail as it is.
        ratio = torch.where((squares[0] > 0) & (squares[1] > 0), ratio, torch.ones_like(ratio))
        return ratio.clamp(_SMALLEST_SHARE, 1.0)[:, None, None]

    def effective_rank(self, shape: Shape) -> int:
        """Columns of the bases of a view; a side with fewer has all of its own."""
        smaller, larger = sorted(shape[1:])
        rank = self.rank or max(_LEAST_RANK, smaller // _PART_OF_SIDE)
        return min(rank, larger)

    # -- another rank --

    def max_rank(self, shape: Shape) -> int:
        return min(shape[1:])

    def sums_for_ranks(self, state: State, moment: Tensor | None) -> list[Tensor]:
        if moment is not None:
            out, into = state["out_basis"].mT @ moment, moment @ state["in_basis"]
            return [
                out.square().sum(-1),
                into.square().sum(-2),
                moment.square().sum((-2, -1)),
            ]
        core, out, into, tail = (state[name] for name in _SQUARES)
        sides = core.sum(-1) + out.sum(-1), core.sum(-2) + into.sum(-2)
        total = sum(_total(part).flatten() for part in (core, out, into, tail))
        return [*sides, torch.as_tensor(total)]

    def turns_for_ranks(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return list(sums)

    def spectra(self, turns: Sequence[Tensor], shape: Shape) -> list[list[Spectrum]]:
        *sides, total = turns
        found: list[list[Spectrum]] = [[] for _ in range(len(total))]
        for side, size in zip(sides, shape[1:], strict=True):
            shares = side.sort(-1, descending=True).values / nonzero(total).unsqueeze(-1)
            outside = (1 - shares.sum(-1)).clamp(min=0) * (total > 0)
            of_groups = zip(found, shares.tolist(), outside.tolist(), strict=True)
            for spectra, inside, rest in of_groups:
                spectra.append(Spectrum(tuple(inside), rest, size - len(inside)))
        return found

    def resized(self, state: State, turns: Sequence[Tensor], rank: int) -> State:
        """See :class:`RankAdaptive`. Second moments go from one part to the other as if the
        coordinates were uncorrelated: those of q^T g are the sums over q^2."""
        out_energy, in_energy, _ = turns
        state = _resized_columns(
            state, in_energy, min(rank, state["in_basis"].shape[-2]), self.seed
        )
        turned = _resized_columns(
            _transposed(state), out_energy, min(rank, state["out_basis"].shape[-2]), self.seed + 1
        )
        return _transposed(turned)

    def health(self, state: State) -> dict[str, Tensor]:
        """Share of the second moments' trace outside both bases, per group ``[G]``."""
        core, out, into, tail = (_total(state[name]).flatten() for name in _SQUARES)
        return {"escaped_mass_share": tail / nonzero(core + out + into + tail)}


def _transposed(state: State) -> State:
    """The state of the transposed matrices; other tensors stay."""
    core, out, into, tail = (state[name].mT for name in _SQUARES)
    return {
        **state,
        "out_basis": state["in_basis"],
        "in_basis": state["out_basis"],
        **dict(zip(_SQUARES, (core, into, out, tail), strict=True)),
    }


def _resized_columns(state: State, energy: Tensor, rank: int, seed: int) -> State:
    """The state with another number of columns of ``in_basis``.

    Args:
        energy: second moments of each column, ``[G, K]``.
    """
    basis, (core, out, into, tail) = state["in_basis"], (state[name] for name in _SQUARES)
    old = basis.shape[-1]
    if rank > old:
        basis = extended_basis(basis, rank, seed=seed + rank)
        squares = basis[..., old:].square()
        core, into = torch.cat([core, out @ squares], -1), torch.cat([into, tail @ squares], -1)
    elif rank < old:
        order = torch.argsort(energy, dim=-1, descending=True, stable=True).unsqueeze(-2)
        basis, core, into = (x.take_along_dim(order, -1) for x in (basis, core, into))
        squares = basis[..., rank:].square().mT
        out, tail = out + core[..., rank:] @ squares, tail + into[..., rank:] @ squares
        basis, core, into = (x[..., :rank] for x in (basis, core, into))
    return {**state, "in_basis": basis, **dict(zip(_SQUARES, (core, out, into, tail), strict=True))}


def _split(x_GMB: Tensor, out_basis: Tensor, in_basis: Tensor) -> Parts:
    """C, O, I and E of the module's first formula; P C Q^T + P O + I Q^T + E is x."""
    out, into = out_basis.mT @ x_GMB, x_GMB @ in_basis
    core = out @ in_basis
    into.baddbmm_(out_basis, core, alpha=-1)
    tail = torch.baddbmm(x_GMB, *_side_by_side(out_basis, out, into, in_basis), alpha=-1)
    return core, out.baddbmm_(core, in_basis.mT, alpha=-1), into, tail


def _side_by_side(
    out_basis: Tensor, out: Tensor, into: Tensor, in_basis: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of P out + into Q^T: one product, which passes once over what has the size of x."""
    return torch.cat([out_basis, into], -1), torch.cat([out, in_basis.mT], -2)


def _noise(state: State) -> Tensor:
    """What of a second moment is rounding, ``[G, 1, 1]``: a share of the mean square.

    Taken from the three small parts, where most of the squares are.
    """
    core, out, into, tail = (state[name] for name in _SQUARES)
    inside = _total(core) + _total(out) + _total(into)
    return inside.mul_(_NOISE / tail[0].numel())


def _total(square: Tensor) -> Tensor:
    return square.sum((-2, -1), keepdim=True)


@fused
def _scale_(x: Tensor, square: Tensor, floor: Tensor, eps: float) -> None:
    """x <- x / (sqrt(max(square, floor)) + eps)."""
    x.div_(torch.maximum(square, floor).sqrt_().add_(eps))


INFOS = (
    OptimizerInfo(
        name="two_sided_basis",
        algorithm=TwoSidedBasis,
        defaults={
            "momentum_site": "gradient",
            "graft": "none",
            "attention_grouping": "kernel",
        },
        summary="Adam in a low-rank rotation of both sides, and Adam as it is outside of it",
        formula=(
            "Bases P [m, k] and Q [n, k] follow the momentum's leading left and right "
            "directions. Its parts P^T M Q, P^T M and M Q outside of the other basis, and the "
            "rest, are each divided by the root of their own moving mean square, and put "
            "together again, the rest made not much larger than the first."
        ),
        paper="of this project, after Yen et al. 2023 (shared bases) and Vyas et al. 2024 (SOAP)",
    ),
)
