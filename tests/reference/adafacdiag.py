"""AdafacDiag and AdafacDiag++: Adafactor in a basis in which the gradient is (nearly) diagonal.

"Improving Adaptive Moment Optimization via Preconditioner Diagonalization" (2024), Algorithm 3. The
rotated gradient G~ is AdaDiag's; of its squares only row and column averages are kept:

    r <- beta2 r + (1 - beta2) (G~^2 + eps) 1
    c <- beta2 c + (1 - beta2) (G~^2 + eps)^T 1
    V = (r / sum r) c^T
    u = G~ / sqrt(V),   u <- u / max(1, RMS(u) / clip_threshold)
    M <- beta1 M + (1 - beta1) u,   d = P (M / (1 - beta1^t)) (Q^T)

and without momentum d = P u (Q^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.adadiag import (
    OWN_BASES,
    PAPER,
    PROJECTION_SETS,
    QR_TOLERANCES,
    ProjectedReference,
    projection_options,
)
from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class AdafacDiagReference(ProjectedReference):
    """One group of AdafacDiag, or with ``two_sided`` of AdafacDiag++."""

    eps: float = 1e-30
    clip_threshold: float = 1.0
    row_second: Tensor | float = 0.0  # r, [s]
    column_second: Tensor | float = 0.0  # c, [l]

    def _accumulate(self, rotated: Tensor) -> None:
        beta2 = self.betas[1]
        squares = rotated**2 + self.eps
        self.row_second = beta2 * self.row_second + (1.0 - beta2) * squares.sum(1)
        self.column_second = beta2 * self.column_second + (1.0 - beta2) * squares.sum(0)
        self._move_moment(self._normalized(rotated))

    def _rotated_direction(self, rotated: Tensor) -> Tensor:
        """M^, or the normalised given one."""
        return self.corrected_moment if self.rotated_momentum else self._normalized(rotated)

    def _normalized(self, rotated: Tensor) -> Tensor:
        """u / max(1, RMS(u) / clip_threshold) with u = G~ / sqrt(V)."""
        r = torch.as_tensor(self.row_second)
        u = rotated / torch.outer(r / r.sum(), torch.as_tensor(self.column_second)).sqrt()
        rms = u.square().mean().sqrt()
        return u / max(1.0, (rms / self.clip_threshold).item())


def _build(options: Options, shape: tuple[int, int], *, two_sided: bool) -> AdafacDiagReference:
    return AdafacDiagReference(
        shape=shape,
        two_sided=two_sided,
        clip_threshold=options["clip_threshold"],
        **projection_options(options),
    )


_SETS: dict[str, Options] = PROJECTION_SETS | {
    # With the paper's eps all of that rounding would count, whatever its size.
    **{label: PROJECTION_SETS[label] | {"eps": 1e-6} for label in OWN_BASES},
    "paper_eps": {"eps": 1e-30},
    "clipped": {"clip_threshold": 0.1},
    "hardly_clipped": {"clip_threshold": 100.0},
    "unrotated_clipped": {"rotated_momentum": False, "clip_threshold": 0.5},
}

ROWS: dict[str, ReferenceRow] = {
    "adafacdiag": ReferenceRow(
        build=lambda options, shape: _build(options, shape, two_sided=False),
        paper=PAPER,
        option_sets=_SETS,
    ),
    "adafacdiag_pp": ReferenceRow(
        build=lambda options, shape: _build(options, shape, two_sided=True),
        paper=PAPER,
        option_sets=_SETS,
        tolerances=QR_TOLERANCES,
    ),
}
