"""The implicit second moments of one shared-basis update.

M_i = a Q R_i Q^T + c g_i g_i^T is b x b and never formed. A = sum_i M_i M_i^T is only multiplied
with thin matrices; what a new basis Q_t keeps and leaves of each M_i lives in k x k. Shapes:
``[G, M, B]`` = groups, blocks, block size; K the rank; L columns of a thin matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigvalsh
from hf_precond.linalg.subspace import orthonormal, times_thin


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """The implicit matrices M_i = a Q R_i Q^T + c g_i g_i^T and A = sum_i M_i M_i^T.

    Sums run over the blocks at hand. All second moments are in units of ``scale``; the gradients
    are divided by its root only after they have been multiplied with something thin.
    """

    basis: Tensor  # Q             [G, B, K]
    coef: Tensor  # R_i            [G, M, K, K]
    g: Tensor  # g_i, raw          [G, M, B]
    scale: Tensor  #               [G, 1, 1]
    x: Tensor  # Q^T g_i           [G, M, K]
    z: Tensor  # R_i Q^T g_i       [G, M, K]
    norm_sq: Tensor  # |g_i|^2     [G, M]
    coef_sq: Tensor  # sum_i R_i^2 [G, K, K]
    decay: float
    weight: float

    @classmethod
    def of(
        cls,
        *,
        basis: Tensor,
        coef: Tensor,
        g: Tensor,
        scale: Tensor,
        norm_sq: Tensor,
        decay: float,
        weight: float,
    ) -> Moments:
        x = g @ basis / scale.sqrt()
        flat = coef.flatten(1, 2)
        return cls(
            basis=basis,
            coef=coef,
            g=g,
            scale=scale,
            x=x,
            z=matvec(coef, x),
            norm_sq=norm_sq,
            coef_sq=flat.mT @ flat,
            decay=decay,
            weight=weight,
        )

    def trace(self) -> Tensor:
        """tr(A) = sum_i ||M_i||_F^2, ``[G]``."""
        from_gradient = 2 * self.decay * self.weight * (self.x * self.z).sum(
            (-2, -1)
        ) + self.weight**2 * self.norm_sq.square().sum(-1)
        return self.decay**2 * trace(self.coef_sq) + from_gradient

    def times(self, y_GBL: Tensor, gy: Tensor | None = None) -> Tensor:
        """A @ y for thin y ``[G, B, L]``, in 4 m b L flops; half where ``project(y)`` is given."""
        a, c = self.decay, self.weight
        inner = self.basis.mT @ y_GBL
        gy = self.project(y_GBL) if gy is None else gy
        small = a**2 * (self.coef_sq @ inner) + a * c * (self.z.mT @ gy)
        mixed = a * c * (self.z @ inner) + c**2 * (self.norm_sq.unsqueeze(-1) * gy)
        return self.basis @ small + times_thin(self.g.mT, mixed) / self.scale.sqrt()

    def project(self, y_GBL: Tensor) -> Tensor:
        """y^T g_i ``[G, M, L]`` in units of the root of ``scale``."""
        return self.g @ y_GBL / self.scale.sqrt()


@dataclass(frozen=True, slots=True)
class Gram:
    """X^T X of a gradient or its moment, multiplied with thin matrices like A of the moments."""

    x: Tensor  # [G, M, B]

    def trace(self) -> Tensor:
        """|X|^2, ``[G]``."""
        return row_squares(self.x).sum(-1)

    def times(self, y_GBL: Tensor, _: Tensor | None = None) -> Tensor:
        """X^T X y for thin y ``[G, B, L]``, in 4 m b L flops."""
        return times_thin(self.x.mT, self.x @ y_GBL)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisTurn:
    """The moments seen from the new basis Q_t: C = Q_t^T Q_{t-1}, y_i = Q_t^T g_i, C R_i."""

    moments: Moments
    basis: Tensor  # Q_t      [G, B, K]
    overlap: Tensor  # C      [G, K, K]
    y: Tensor  # y_i          [G, M, K]
    residual: Tensor  # g_i - Q_t Q_t^T g_i, raw  [G, M, B]
    left: Tensor  # C R_i     [G, M, K, K]

    @classmethod
    def of(cls, moments: Moments, basis: Tensor) -> BasisTurn:
        overlap = basis.mT @ moments.basis
        left = right_multiply(moments.coef, overlap.mT).mT  # (R_i C^T)^T, R_i symmetric
        inside = moments.g @ basis
        return cls(
            moments=moments,
            basis=basis,
            overlap=overlap,
            y=inside / moments.scale.sqrt(),
            residual=torch.baddbmm(moments.g, inside, basis.mT, alpha=-1),
            left=left,
        )

    def coef(self) -> Tensor:
        """Q_t^T M_i Q_t = a C R_i C^T + c y_i y_i^T, ``[G, M, K, K]``."""
        out = right_multiply(self.left, self.overlap.mT).mul_(self.moments.decay)
        return out.addcmul_(self.y.unsqueeze(-1), self.y.unsqueeze(-2), value=self.moments.weight)

    def carry_over(self, root: Tensor) -> Tensor:
        """C root_i C^T: a root of the previous basis in the new one."""
        return right_multiply(right_multiply(root, self.overlap.mT).mT, self.overlap.mT)

    def block_norm(self, lowest: Tensor) -> Tensor:
        """``[G, M]``: bound of ||M_i - Q_t R_i Q_t^T||_2 from the norms of its four blocks."""
        a, c, coef = self.moments.decay, self.moments.weight, self.moments.coef
        escaped = self.moments.basis - self.basis @ self.overlap
        # Orthogonalised twice: after the first pass what is left is mostly rounding of what was
        # removed.
        escaped = escaped - self.basis @ (self.basis.mT @ escaped)
        gram = escaped.mT @ escaped
        e = self.moments.project(
            escaped
        )  # the product itself: a difference of projections would cancel
        residual_sq = row_squares(self.residual) / self.moments.scale.squeeze(-1)
        off_sq = (
            a**2 * (right_multiply(self.left, gram) * self.left).sum((-2, -1))
            + 2 * a * c * (matvec(self.left, e) * self.y).sum(-1)
            + c**2 * residual_sq * self.y.square().sum(-1)
        )
        coef_gram = right_multiply(coef, gram)
        rest_sq = (
            a**2 * (coef_gram * coef_gram.mT).sum((-2, -1))
            + 2 * a * c * (matvec(coef, e) * e).sum(-1)
            + c**2 * residual_sq.square()
        )
        return block_norm_bound(lowest, rest_sq.clamp(min=0).sqrt(), off_sq.clamp(min=0).sqrt())

    def mean_residual(self) -> Tensor:
        """``[G, M]``: mean eigenvalue of M_i outside Q_t, tr((I - QQ^T) M_i) / (b - k)."""
        a, c, coef = self.moments.decay, self.moments.weight, self.moments.coef
        escaped = self._escaped()
        gram = escaped.mT @ escaped
        residual_sq = row_squares(self.residual) / self.moments.scale.squeeze(-1)
        outside = a * (coef * gram.unsqueeze(1)).sum((-2, -1)) + c * residual_sq
        return outside.clamp_(min=0) / max(1, self.basis.shape[-2] - self.basis.shape[-1])

    def _escaped(self) -> Tensor:
        """E = (I - Q_t Q_t^T) Q_{t-1}, ``[G, B, K]``."""
        escaped = self.moments.basis - self.basis @ self.overlap
        # Orthogonalised twice: what the first pass leaves is mostly rounding of what it removed.
        return escaped - self.basis @ (self.basis.mT @ escaped)

    def exact_norm(self, coef: Tensor, lowest: Tensor) -> Tensor:
        """``[G, M]``: the same norm in the span of (Q_t, Q_{t-1}, g_i), 2k + 1 dimensions; slow."""
        groups, blocks, size = self.moments.g.shape
        previous = self.moments.basis.unsqueeze(1).expand(groups, blocks, size, -1)
        current = self.basis.unsqueeze(1).expand(groups, blocks, size, -1)
        gradient = (self.moments.g / self.moments.scale.sqrt()).unsqueeze(-1)
        span = orthonormal(torch.cat([current, previous, gradient], -1))
        old, now = span.mT @ previous, span.mT @ current
        g = (span.mT @ gradient).squeeze(-1)
        kept = coef - torch.diag_embed(lowest.unsqueeze(-1).expand(coef.shape[:-1]))
        difference = self.moments.decay * (old @ self.moments.coef @ old.mT) - now @ kept @ now.mT
        difference.addcmul_(g.unsqueeze(-1), g.unsqueeze(-2), value=self.moments.weight)
        return eigvalsh((difference + difference.mT) / 2).abs().amax(-1)


def block_norm_bound(inside: Tensor, rest: Tensor, off: Tensor) -> Tensor:
    """Norm of the matrix of block norms [[inside, off], [off, rest]], a bound from above."""
    return (inside + rest) / 2 + torch.hypot((inside - rest) / 2, off)


def right_multiply(a_GMKK: Tensor, b_GKK: Tensor) -> Tensor:
    """a_i @ b for all blocks of a group as one matrix product."""
    return (a_GMKK.flatten(1, 2) @ b_GKK).view(a_GMKK.shape)


def matvec(a_GMKK: Tensor, x_GMK: Tensor) -> Tensor:
    """a_i @ x_i for symmetric or general a, ``[G, M, K]``."""
    return (a_GMKK @ x_GMK.unsqueeze(-1)).squeeze(-1)


def row_squares(x_GMB: Tensor) -> Tensor:
    """|x_i|^2, ``[G, M]``, in one pass."""
    return torch.linalg.vector_norm(x_GMB, dim=-1).square_()


def trace(a_KK: Tensor) -> Tensor:
    """Trace over the last two dimensions."""
    return a_KK.diagonal(dim1=-2, dim2=-1).sum(-1)


def nonzero(x: Tensor) -> Tensor:
    """x with zeros replaced by one."""
    return torch.where(x > 0, x, torch.ones_like(x))
