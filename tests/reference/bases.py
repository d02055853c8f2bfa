"""Orthogonal bases that follow gradients: what the AdaDiag, AdafacDiag and SOAP references share.

    G~ = P^T G Q,   G = P G~ Q^T

P and Q hold the singular vectors of a gradient (AdaDiag), or the eigenvectors of averages of G G^T
and G^T G (SOAP), largest first. Four conventions make them unique:

- rank: vectors whose singular value or eigenvalue is no more than rounding are not kept;
- sign: the largest entry in magnitude of each kept (left) vector is positive;
- completion: the previous basis' columns of the remaining indices, projected off what is there
  already, in order;
- a column that lies in that span leaves its place to the next one, after the last to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
SHIFT = 1e-8  # delta of the orthogonal iteration in float64
NEW_DIRECTION = 1e-6  # a unit vector with less than this outside a span lies in it


@dataclass(frozen=True)
class Bases:
    """Orthogonal P (``left``) and Q (``right``)."""

    left: Tensor
    right: Tensor

    @classmethod
    def identity(cls, rows: int, columns: int) -> Bases:
        """P = I and Q = I: before anything is known."""
        return cls(*(torch.eye(size, dtype=torch.float64) for size in (rows, columns)))

    def rotate(self, x: Tensor) -> Tensor:
        """P^T X Q."""
        return self.left.T @ x @ self.right

    def rotate_back(self, x: Tensor) -> Tensor:
        """P X Q^T."""
        return self.left @ x @ self.right.T


def q_factor(x: Tensor) -> Tensor:
    """Q of X = Q R with diag(R) >= 0."""
    q, r = torch.linalg.qr(x)
    return torch.where(r.diagonal() < 0, -q, q)


def complete(vectors: Tensor, previous: Tensor) -> Tensor:
    """Q of [vectors, previous columns of the remaining indices], with diag(R) >= 0."""
    basis, kept = q_factor(vectors), vectors.shape[1]
    for column in [*previous.T[kept:], *previous.T[:kept]]:
        outside = _project_off(basis, _project_off(basis, column))  # once more, against rounding
        if outside.norm() > NEW_DIRECTION:
            basis = torch.cat([basis, (outside / outside.norm())[:, None]], dim=1)
    return basis


def orthogonal_iteration(matrix: Tensor, basis: Tensor) -> Tensor:
    """Q factor of A Q + delta tr(A) Q; A = 0 keeps the basis."""
    trace = matrix.trace()
    return q_factor(matrix @ basis + SHIFT * trace * basis) if trace > 0 else basis


def eigenbasis(matrix: Tensor, previous: Tensor) -> Tensor:
    """Eigenvectors, largest first, completed from the previous basis; w_j > d eps w_1 are kept."""
    w, vectors = _descending_eigh(matrix)
    vectors = vectors[:, w > len(w) * EPS * w[0]]
    return complete(vectors * _peak_signs(vectors), previous)


def singular_bases(g: Tensor, before: Bases, method: str) -> Bases:
    """P and Q of G = P S Q^T, or one step of orthogonal iteration towards them."""
    if method == "qr":
        left = orthogonal_iteration(g @ g.T, before.left)
        return Bases(left, orthogonal_iteration(g.T @ g, before.right))
    left, right = _by_svd(g) if method == "svd" else _by_eigh(g)
    signs = _peak_signs(left)
    return Bases(complete(left * signs, before.left), complete(right * signs, before.right))


def _by_svd(g: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with S_j > l eps S_1, l the larger dimension."""
    p, s, q_transposed = torch.linalg.svd(g, full_matrices=False)
    kept = s > max(g.shape) * EPS * s[0]
    return p[:, kept], q_transposed.T[:, kept]


def _by_eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """The same from G G^T, with S_j^2 > l eps S_1^2 and the right vectors G^T P_j / S_j."""
    w, p = _descending_eigh(g @ g.T)
    kept = w > max(g.shape) * EPS * w[0]
    return p[:, kept], g.T @ p[:, kept] / w[kept].sqrt()


def _descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    w, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return w.clamp(min=0).flip(0), vectors.flip(1)


def _peak_signs(vectors: Tensor) -> Tensor:
    """Sign of the largest entry in magnitude, column by column."""
    return vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def _project_off(basis: Tensor, x: Tensor) -> Tensor:
    return x - basis @ (basis.T @ x)
