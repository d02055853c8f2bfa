"""SOAP: Adam in the eigenbasis of Shampoo's two factors.

Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade: "SOAP: Improving and Stabilizing
Shampoo using Adam" (2024), Algorithm 3, in the order of the authors' program. With b the decay of
the factors, step 1 only initialises and moves nothing:

    L = (1 - b) G G^T,   R = (1 - b) G^T G,   Q_L and Q_R their eigenvectors

Every later step, tau = t - 1:

    G' = Q_L^T G Q_R
    M <- beta1 M + (1 - beta1) G',   V <- beta2 V + (1 - beta2) G'^2
    d = Q_L (M^ / (sqrt(V^) + eps)) Q_R^T,   M^ = M / (1 - beta1^tau),   V^ = V / (1 - beta2^tau)
    L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G
    where tau mod f = 0: new bases; M goes over to them, V follows their reordering only
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.bases import Bases, eigenbasis, orthogonal_iteration
from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class SoapReference:
    """One group.

    Args:
        basis_interval: f.
        basis_method: "qr" for one step of orthogonal iteration, "eigh" for eigenvectors.
        max_dim: a side longer than this keeps the identity.
        shampoo_beta: b; ``None``: beta2.
    """

    shape: tuple[int, int]
    basis_interval: int
    basis_method: str = "qr"
    max_dim: int = 10_000
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    step: int = 0
    bases: Bases = field(init=False)
    factors: list[Tensor] = field(init=False)  # L and R
    moment: Tensor = field(init=False)  # M, in the rotated space
    second: Tensor = field(init=False)  # V, in the rotated space
    direction: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bases = Bases.identity(*self.shape)
        self.factors = [torch.zeros(d, d, dtype=torch.float64) for d in self.shape]
        self.moment, self.second, self.direction = torch.zeros(3, *self.shape, dtype=torch.float64)

    def update(self, grads: Tensor) -> None:
        """Takes the gradient of one step into moments, factors and bases, in this order."""
        self.step += 1
        if self.step == 1:
            self._accumulate_factors(grads)
            self.bases = self._eigenbases()
            return
        self._accumulate_moments(self.bases.rotate(grads))
        self.direction = self._direction()
        self._accumulate_factors(grads)
        if (self.step - 1) % self.basis_interval == 0:
            self._refresh()

    def apply(self, x: Tensor) -> Tensor:
        """The direction of this step's bases, whatever x; the bases may have moved on since."""
        return self.direction

    def _accumulate_factors(self, g: Tensor) -> None:
        beta = self.betas[1] if self.shampoo_beta is None else self.shampoo_beta
        new = (g @ g.T, g.T @ g)
        self.factors = [
            beta * old + (1.0 - beta) * square
            for old, square in zip(self.factors, new, strict=True)
        ]

    def _accumulate_moments(self, rotated: Tensor) -> None:
        beta1, beta2 = self.betas
        self.moment = beta1 * self.moment + (1.0 - beta1) * rotated
        self.second = beta2 * self.second + (1.0 - beta2) * rotated**2

    def _direction(self) -> Tensor:
        moment, second = (
            x / (1.0 - beta ** (self.step - 1))
            for x, beta in zip((self.moment, self.second), self.betas, strict=True)
        )
        return self.bases.rotate_back(moment / (second.sqrt() + self.eps))

    def _refresh(self) -> None:
        before = self.bases
        if self.basis_method == "eigh":
            self.bases = self._eigenbases()
        else:
            self.bases = self._iterated_bases()
        self.moment = self.bases.rotate(before.rotate_back(self.moment))

    def _sides(self) -> list[tuple[Tensor, Tensor]]:
        """Factor and basis of each side; an empty factor where the side is not rotated."""
        factors = (f if len(f) <= self.max_dim else torch.zeros_like(f) for f in self.factors)
        return list(zip(factors, (self.bases.left, self.bases.right), strict=True))

    def _eigenbases(self) -> Bases:
        return Bases(*(eigenbasis(factor, basis) for factor, basis in self._sides()))

    def _iterated_bases(self) -> Bases:
        """Columns reordered by the estimates diag(Q^T L Q), V with them, then one iteration."""
        sides = self._sides()
        rows, columns = (_descending((q.T @ factor @ q).diagonal()) for factor, q in sides)
        self.second = self.second[rows][:, columns]
        return Bases(
            *(
                orthogonal_iteration(factor, q[:, order])
                for (factor, q), order in zip(sides, (rows, columns), strict=True)
            )
        )


def _descending(estimates: Tensor) -> Tensor:
    return torch.argsort(estimates, descending=True, stable=True)


def _build(options: Options, shape: tuple[int, int]) -> SoapReference:
    same = ("basis_interval", "basis_method", "max_dim", "betas", "shampoo_beta", "eps")
    return SoapReference(shape=shape, **{key: options[key] for key in same})


ROWS: dict[str, ReferenceRow] = {
    "soap": ReferenceRow(
        build=_build,
        paper={"basis_interval": 3},
        option_sets={
            "paper": {},
            "eigh": {"basis_method": "eigh"},
            "every_step": {"basis_interval": 1},
            "every_step_eigh": {"basis_interval": 1, "basis_method": "eigh"},
            "every_fourth": {"basis_interval": 4},
            "never_again": {"basis_interval": 1000},
            "factor_decay": {"shampoo_beta": 0.8},
            "factor_decay_eigh": {"shampoo_beta": 0.5, "basis_method": "eigh"},
            "one_sided": {"max_dim": 4},
            "one_sided_eigh": {"max_dim": 4, "basis_method": "eigh"},
            "no_side": {"max_dim": 1},
            "betas": {"betas": (0.5, 0.7)},
            "large_eps": {"eps": 0.1},
        },
        # A row of zeros is rounding once it is rotated, and then divided by little more than eps.
        tolerances={"degenerate": 1e-5},
    ),
}
