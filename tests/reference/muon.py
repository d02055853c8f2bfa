"""Muon: the nearly orthogonal factor of the momentum, by Newton-Schulz iterations.

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: "Muon: An optimizer for hidden layers in
neural networks" (2024). With no more rows than columns (else transposed):

    X = G / ||G||_F
    A = X X^T,   X <- a X + (b A + c A^2) X     ns_steps times

so every singular value s becomes a s + b s^3 + c s^5, and again. The scale is Jordan's
sqrt(max(1, m / n)) ("original"), or 0.2 sqrt(max(m, n)), which gives the step the RMS of AdamW's
(Liu et al.: "Muon is Scalable for LLM Training", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class MuonReference:
    """One group.

    Args:
        eps: the norm is not taken to be smaller than this.
    """

    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    adjust_lr_fn: str = "match_rms_adamw"
    eps: float = 1e-7

    def update(self, grads: Tensor) -> None:
        """Muon has no statistics."""

    def apply(self, x: Tensor) -> Tensor:
        """The scaled factor of x."""
        rows, columns = x.shape
        factor = self._orthogonalized(x.T).T if rows > columns else self._orthogonalized(x)
        scales = {
            "match_rms_adamw": 0.2 * sqrt(max(rows, columns)),
            "original": sqrt(max(1.0, rows / columns)),
            "none": 1.0,
        }
        return scales[self.adjust_lr_fn] * factor

    def _orthogonalized(self, x: Tensor) -> Tensor:
        a, b, c = self.ns_coefficients
        x = x / x.norm().clamp(min=self.eps)
        for _ in range(self.ns_steps):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x


def _build(options: Options, shape: tuple[int, int]) -> MuonReference:
    same = ("ns_steps", "ns_coefficients", "adjust_lr_fn", "eps")
    return MuonReference(**{key: options[key] for key in same})


ROWS: dict[str, ReferenceRow] = {
    "muon": ReferenceRow(
        build=_build,
        option_sets={
            "paper": {},
            "one_iteration": {"ns_steps": 1},
            "many_iterations": {"ns_steps": 10},
            "cubic": {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 12},
            "original_scale": {"adjust_lr_fn": "original"},
            "no_scale": {"adjust_lr_fn": "none"},
            "large_eps": {"eps": 10.0},
        },
    ),
}
