"""AdaDiag and AdaDiag++: Adam in a basis in which the gradient is (nearly) diagonal.

"Improving Adaptive Moment Optimization via Preconditioner Diagonalization" (2024), Algorithm 1. One
group = one matrix G, transposed where it has more rows than columns. Every T steps G = P S Q^T with
full P and Q, before that P = Q = I; between refreshes both stay:

    G~ = P^T G  (AdaDiag)   or   P^T G Q  (AdaDiag++)
    M <- beta1 M + (1 - beta1) G~
    V <- beta2 V + (1 - beta2) G~^2
    d = P (M^ / (sqrt(V^) + eps)) (Q^T),   M^ = M / (1 - beta1^t),   V^ = V / (1 - beta2^t)

M and V outlive their basis unrotated, so the conventions of :mod:`tests.reference.bases` matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.bases import Bases, singular_bases
from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class ProjectedReference:
    """The projection of one group, and the moment that lives in it.

    Args:
        projection_interval: T; the basis is refreshed where t mod T = 0, from that step's gradient
            and before its moments.
        first_svd: "step1" refreshes at t = 1 too.
        reproject_moments: M <- P_new^T P_old M (Q_old^T Q_new) at a refresh; V is kept as it is.
        rotated_momentum: without it the moment is left to the stages around the algorithm.
    """

    shape: tuple[int, int]
    two_sided: bool
    projection_interval: int
    basis_method: str = "svd"
    first_svd: str = "interval"
    reproject_moments: bool = False
    rotated_momentum: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float
    step: int = 0
    bases: Bases = field(init=False)
    moment: Tensor = field(init=False)  # M, [s, l]

    def __post_init__(self) -> None:
        short, long = sorted(self.shape)
        self.bases = Bases.identity(short, long)
        self.moment = torch.zeros(short, long, dtype=torch.float64)

    def update(self, grads: Tensor) -> None:
        """Takes the gradient of one step into basis and moments."""
        self.step += 1
        g = self._oriented(grads)
        if self.step % self.projection_interval == 0 or self._is_early_start:
            self._project(g)
        self._accumulate(self.bases.rotate(g))

    def apply(self, x: Tensor) -> Tensor:
        """P d~ Q^T; x matters only without rotated momentum."""
        rotated = self.bases.rotate(self._oriented(x))
        return self._oriented(self.bases.rotate_back(self._rotated_direction(rotated)))

    @property
    def corrected_moment(self) -> Tensor:
        """M / (1 - beta1^t)."""
        return self.moment / (1.0 - self.betas[0] ** self.step)

    @property
    def _is_early_start(self) -> bool:
        return self.step == 1 and self.first_svd == "step1"

    def _oriented(self, x: Tensor) -> Tensor:
        """To no more rows than columns, and back."""
        return x.T if self.shape[0] > self.shape[1] else x

    def _project(self, g: Tensor) -> None:
        before = self.bases
        found = singular_bases(g, before, self.basis_method)
        self.bases = found if self.two_sided else Bases(found.left, before.right)
        if self.reproject_moments:
            self.moment = self.bases.rotate(before.rotate_back(self.moment))

    def _move_moment(self, x: Tensor) -> None:
        beta1 = self.betas[0]
        self.moment = beta1 * self.moment + (1.0 - beta1) * x

    def _accumulate(self, rotated: Tensor) -> None:
        raise NotImplementedError

    def _rotated_direction(self, rotated: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(kw_only=True)
class AdaDiagReference(ProjectedReference):
    """One group of AdaDiag, or with ``two_sided`` of AdaDiag++."""

    eps: float = 1e-8
    second: Tensor | float = 0.0  # V, [s, l]

    def _accumulate(self, rotated: Tensor) -> None:
        beta2 = self.betas[1]
        self._move_moment(rotated)
        self.second = beta2 * self.second + (1.0 - beta2) * rotated**2

    def _rotated_direction(self, rotated: Tensor) -> Tensor:
        """M^ / (sqrt(V^) + eps), or the same with what is given in place of M^."""
        second = torch.as_tensor(self.second / (1.0 - self.betas[1] ** self.step))
        moment = self.corrected_moment if self.rotated_momentum else rotated
        return moment / (second.sqrt() + self.eps)


def projection_options(options: Options) -> dict[str, Any]:
    """What both families take over by name."""
    same = (
        "projection_interval",
        "basis_method",
        "first_svd",
        "reproject_moments",
        "rotated_momentum",
        "betas",
        "eps",
    )
    return {key: options[key] for key in same}


PAPER: Options = {"projection_interval": 3}  # 200 and more would never be reached
PROJECTION_SETS: dict[str, Options] = {
    "paper": {},
    "eigh": {"basis_method": "eigh"},
    "qr": {"basis_method": "qr"},
    "every_step": {"projection_interval": 1},
    "every_step_qr": {"projection_interval": 1, "basis_method": "qr"},
    "every_fourth": {"projection_interval": 4},
    "every_fourth_eigh": {"projection_interval": 4, "basis_method": "eigh"},
    "never": {"projection_interval": 1000},
    "from_step_one": {"first_svd": "step1"},
    "from_step_one_eigh": {"first_svd": "step1", "basis_method": "eigh"},
    "from_step_one_qr": {"first_svd": "step1", "basis_method": "qr"},
    "once": {"first_svd": "step1", "projection_interval": 1000},
    "reprojected": {"reproject_moments": True},
    "reprojected_eigh": {"reproject_moments": True, "basis_method": "eigh"},
    "reprojected_qr": {"reproject_moments": True, "basis_method": "qr"},
    "reprojected_every_step": {"reproject_moments": True, "projection_interval": 1},
    "unrotated": {"rotated_momentum": False},
    "unrotated_momentum_of_gradient": {
        "rotated_momentum": False,
        "momentum": "ema",
        "momentum_site": "gradient",
    },
    "betas": {"betas": (0.5, 0.7)},
    "large_eps": {"eps": 0.1},
}
# G^T G has fewer than l nonzero eigenvalues: the shift of 1e-8 alone tells the other columns of Q
# apart, and rounding grows as much.
QR_TOLERANCES: dict[str, float] = {
    label: 1e-6 for label, options in PROJECTION_SETS.items() if options.get("basis_method") == "qr"
}
# In the bases of the very gradient the rotated one is diagonal: the rest of it is rounding, and
# where it was rounding from the first step on it is divided by little more than eps.
OWN_BASES = ("every_step", "reprojected_every_step", "from_step_one", "from_step_one_eigh", "once")


def _build(options: Options, shape: tuple[int, int], *, two_sided: bool) -> AdaDiagReference:
    return AdaDiagReference(shape=shape, two_sided=two_sided, **projection_options(options))


ROWS: dict[str, ReferenceRow] = {
    "adadiag": ReferenceRow(
        build=lambda options, shape: _build(options, shape, two_sided=False),
        paper=PAPER,
        option_sets=PROJECTION_SETS,
    ),
    "adadiag_pp": ReferenceRow(
        build=lambda options, shape: _build(options, shape, two_sided=True),
        paper=PAPER,
        option_sets=PROJECTION_SETS,
        tolerances=QR_TOLERANCES | dict.fromkeys(OWN_BASES, 1e-6),
    ),
}
