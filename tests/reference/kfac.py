"""The K-FAC family with every matrix formed.

K-FAC: Martens, Grosse (2015). RS-KFAC and SRE-KFAC: Puiu, "Randomized K-FACs" (2022). B-KFAC,
B-R-KFAC, B-KFAC-C: Puiu, "Brand New K-FACs" (2022), Algorithms 1 to 8. A layer's columns A [B, n]
of inputs and G [M, n] of output gradients make two factors,

    Abar <- rho Abar + (1 - rho) A A^T,   Gbar <- rho Gbar + (1 - rho) G G^T,

the first ones unscaled. A factor is applied through a form U diag(D) U^T of some width w, D
descending: direction = X_G^{-1} x X_A^{-1} with X = U diag(D - m) U^T + (lam + m) I,
lam = damping * D[0], and m = D[w - 1] with spectrum continuation, else 0. A form without a positive
eigenvalue stands for X = I.

Brand's algorithm is exact, so the form it makes of (U, D) and A is the eigendecomposition of

    Mtilde = rho U_r diag(D_r) U_r^T + (1 - rho) A A^T,

r the rank to which the old form is truncated before; here that d x d matrix is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_precond.preconditioners.schedule import Schedule
from tests.reference.columns import ReferenceColumns, gradient_columns
from tests.reference.row import Options, ReferenceRow

BRAND = ("b_kfac", "b_r_kfac", "b_kfac_c")
EPS = torch.finfo(torch.float64).eps


@dataclass(kw_only=True)
class KfacReference:
    """One group.

    Args:
        kind: "kfac", "rs_kfac", "sre_kfac", "b_kfac", "b_r_kfac" or "b_kfac_c".
        shape: (M, B).
        factor_decay: rho.
        damping: a schedule, as the rank and the oversampling; its value of the present step counts.
        factor_form: of the b_* kinds. "brand", "rsvd", or "auto": Brand's form for a side with
            largest rank + ``max_columns`` < its size. The other sides do what rs_kfac does.
        adaptive_rank: the rank goes by ``rank_step`` up where D[r - 1] / D[0] > ``rank_target``,
            else down, after each refresh of a form, within [min(rank_step, rank), rank].
        overwrite: of b_r_kfac. "previous": the form becomes the RSVD of the factor before this
            step's columns, Brand's update follows; "factor": that of the factor with them.
        authors_code: lam + rho^u, u the number of updates; overwrite "factor", a correction_share
            of 0.2, adaptive_rank.
        application: "linear": (X_G^{-1} G)(A^T X_A^{-1}) where both sides have Brand's form and
            the step's columns are complete.
    """

    kind: str
    shape: tuple[int, int]
    factor_decay: float = 0.95
    damping: Schedule | str | float = 0.1
    continuation: bool = True
    update_interval: int = 1
    inverse_interval: int = 1
    rank: Schedule | str | int = 220
    oversampling: Schedule | str | int = 10
    power_iterations: int = 4
    adaptive_rank: bool = False
    rank_target: float = 0.033
    rank_step: int = 10
    factor_form: str = "auto"
    max_columns: int | None = None
    brand_interval: int = 1
    rsvd_interval: int = 1
    overwrite: str = "previous"
    correction_interval: int = 1
    correction_share: float = 0.5
    application: str = "plain"
    authors_code: bool = False
    seed: int = 0
    steps_per_epoch: float | None = None
    step: int = 0
    input_side: Side = field(init=False)
    output_side: Side = field(init=False)

    def __post_init__(self) -> None:
        if self.authors_code:
            self.overwrite, self.correction_share, self.adaptive_rank = "factor", 0.2, True
        self.damping = Schedule.parse(self.damping)
        self.rank = Schedule.parse(self.rank)
        self.oversampling = Schedule.parse(self.oversampling)
        rows, columns = self.shape
        self.output_side, self.input_side = Side(self, rows), Side(self, columns)

    def update(self, grads: Tensor, columns: ReferenceColumns | None = None) -> None:
        """Begins a step: factors and forms, each when due.

        Args:
            columns: of this step; without any (``count`` 0) the factors stay. ``None``: made up
                from the gradient.
        """
        self.step += 1
        inputs, outputs = (gradient_columns(grads) if columns is None else columns).flat
        self.input_side.observe(inputs)
        self.output_side.observe(outputs)

    def apply(self, x: Tensor, columns: ReferenceColumns | None = None) -> Tensor:
        """X_G^{-1} x X_A^{-1}; ``columns`` for the linear application."""
        left, right = self.output_side.matrix(), self.input_side.matrix()
        linear = self.application == "linear" and self.input_side.brand and self.output_side.brand
        if linear and columns is not None and columns.count and columns.complete:
            inputs, outputs = columns.flat
            return torch.linalg.solve(left, outputs) @ torch.linalg.solve(right, inputs).T
        return torch.linalg.solve(right, torch.linalg.solve(left, x).T).T

    def due(self, interval: int) -> bool:
        """True at steps 1, 1 + T, 1 + 2T, ..."""
        return (self.step - 1) % interval == 0

    def value(self, schedule: Schedule) -> float:
        """The value of a schedule at this step."""
        return schedule.at(self.step, lambda: (self.step - 1) / self.steps_per_epoch)

    def generator(self) -> torch.Generator:
        """The random numbers of this step, from their start."""
        return torch.Generator().manual_seed(self.seed + 1_000_003 * self.step)


class Side:
    """One of the two factors, d x d, and its form.

    Attributes:
        updates: u, how often columns came in.
        rank: what the adaptive rank has come to.
        vectors: U [d, w], zero where D is.
        values: D [w], descending.
    """

    def __init__(self, method: KfacReference, size: int) -> None:
        self.method, self.size = method, size
        self.updates = 0
        self.rank: int | None = None
        self.factor = torch.zeros(size, size, dtype=torch.float64)
        self.vectors = self.factor[:, :0]
        self.values = self.factor[0, :0]

    @property
    def brand(self) -> bool:
        """Whether this side has Brand's form."""
        method = self.method
        if method.kind not in BRAND or method.factor_form != "auto":
            return method.kind in BRAND and method.factor_form == "brand"
        largest = max(method.rank.values)
        return method.max_columns is not None and largest + method.max_columns < self.size

    def observe(self, columns: Tensor) -> None:
        """Takes the columns [d, n] of a step in."""
        if not self.brand:
            self._average(columns)
            if self.method.due(self.method.inverse_interval) and self.updates:
                self._refresh()
        elif self.method.kind == "b_kfac":
            if self._brand_update(columns):
                self.updates += 1
                self._adapt()
        elif self.method.kind == "b_r_kfac":
            self._observe_with_rsvd(columns)
        else:
            self._observe_with_correction(columns)

    def matrix(self) -> Tensor:
        """X = U diag(D - m) U^T + (lam + m) I."""
        eye = torch.eye(self.size, dtype=torch.float64)
        if len(self.values) == 0 or self.values[0] == 0.0:
            return eye
        method = self.method
        lam = method.value(method.damping) * self.values[0]
        if method.authors_code:
            lam = lam + method.factor_decay**self.updates
        least = self.values[-1] if method.continuation else 0.0
        return self._dense(self.vectors, self.values - least) + (lam + least) * eye

    def _average(self, columns: Tensor) -> None:
        """Factor <- rho factor + (1 - rho) A A^T when due."""
        if columns.shape[1] == 0 or not self.method.due(self.method.update_interval):
            return
        rho = self.method.factor_decay
        new = columns @ columns.T
        self.factor = new if self.updates == 0 else rho * self.factor + (1.0 - rho) * new
        self.updates += 1

    def _refresh(self) -> None:
        """A form of the true factor."""
        if self.method.kind == "kfac":
            self._set_form(*self._evd(self.factor), width=self.size)
        else:
            self._randomized()
            self._adapt()

    def _observe_with_rsvd(self, columns: Tensor) -> None:
        """B-R-KFAC, Algorithm 5."""
        rsvd = self.method.due(self.method.rsvd_interval) and self.updates > 0
        previous = self.method.overwrite == "previous"
        if rsvd and previous:
            self._randomized()
        self._average(columns)
        if rsvd and not previous:
            self._randomized()
            self._adapt()
        elif self._brand_update(columns) or rsvd:
            self._adapt()

    def _observe_with_correction(self, columns: Tensor) -> None:
        """B-KFAC-C, Algorithms 6 and 7."""
        correct = self.method.due(self.method.correction_interval) and self.updates > 0
        self._average(columns)
        updated = self._brand_update(columns)
        if correct and len(self.values):
            self._correct()
        if updated:
            self._adapt()

    def _brand_update(self, columns: Tensor) -> bool:
        """Algorithm 4; returns whether it was due."""
        n = columns.shape[1]
        if n == 0 or not self.method.due(self.method.brand_interval):
            return False
        kept = min(len(self.values), self._rank())
        updated = columns @ columns.T
        if len(self.values):
            rho = self.method.factor_decay
            truncated = self._dense(self.vectors[:, :kept], self.values[:kept])
            updated = rho * truncated + (1.0 - rho) * updated
        self._set_form(*self._evd(updated), width=min(kept + n, self.size))
        return True

    def _randomized(self) -> None:
        """The RSVD, or the randomised symmetric EVD, of the factor, r columns wide."""
        x, rank = self.factor, self._rank()
        # Drawn for the ceiling, so that all factors of a size share their random numbers.
        drawn = min(self.size, self._ceiling() + int(self.method.value(self.method.oversampling)))
        if drawn == self.size:
            self._set_form(*self._evd(x), width=rank)
            return
        rng = self.method.generator()
        omega = torch.randn(self.size, drawn, generator=rng, dtype=torch.float64)
        basis = torch.linalg.qr(x @ omega).Q
        for _ in range(self.method.power_iterations):
            basis = torch.linalg.qr(x @ basis).Q
        if self.method.kind == "sre_kfac":
            vectors, values = self._evd(basis.T @ x @ basis)
            self._set_form(basis @ vectors, values, width=rank)
        else:  # the right singular vectors of Y^T X
            _, values, right = torch.linalg.svd(basis.T @ x, full_matrices=False)
            self._set_form(right.T, values, width=rank)

    def _correct(self) -> None:
        """Algorithm 6: some columns of U turned to what the factor is in their span."""
        rank = min(self._ceiling(), len(self.values))
        count = max(1, round(self.method.correction_share * rank))
        chosen = torch.randperm(rank, generator=self.method.generator())[:count]
        columns = self.vectors[:, chosen]
        turn, corrected = self._evd(columns.T @ self.factor @ columns)
        vectors, values = self.vectors.clone(), self.values.clone()
        vectors[:, chosen], values[chosen] = columns @ turn, corrected
        order = values.argsort(descending=True, stable=True)
        self._set_form(vectors[:, order], values[order], width=len(values))

    def _rank(self) -> int:
        """r: the schedule's value, or the adaptive one below it, and at most d."""
        return self._ceiling() if self.rank is None else min(self._ceiling(), self.rank)

    def _ceiling(self) -> int:
        return min(int(self.method.value(self.method.rank)), self.size)

    def _adapt(self) -> None:
        """Moves the adaptive rank, for the next refresh."""
        if not self.method.adaptive_rank:
            return
        ceiling = self._ceiling()
        rank, step = self._rank(), self.method.rank_step
        last = self.values[rank - 1] if rank <= len(self.values) else 0.0
        rank += step if last > self.method.rank_target * self.values[0] else -step
        self.rank = min(max(rank, min(step, ceiling)), ceiling)

    def _set_form(self, vectors: Tensor, values: Tensor, *, width: int) -> None:
        """Keeps the first columns, those of eigenvalues at the level of rounding as zeros."""
        vectors, values = vectors[:, :width], values[:width]
        kept = values > self.size * EPS * values[0]
        self.vectors, self.values = vectors * kept, torch.where(kept, values, 0.0)

    @staticmethod
    def _dense(vectors: Tensor, values: Tensor) -> Tensor:
        return vectors @ torch.diag(values) @ vectors.T

    @staticmethod
    def _evd(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues, descending."""
        values, vectors = torch.linalg.eigh(matrix)
        return vectors.flip(1), values.flip(0)


_COMMON = ("factor_decay", "damping", "continuation", "update_interval", "inverse_interval")
_LOW_RANK = (
    "rank",
    "oversampling",
    "power_iterations",
    "adaptive_rank",
    "rank_target",
    "rank_step",
    "authors_code",
    "seed",
)
_BRAND = ("factor_form", "max_columns", "brand_interval", "application")
_FIELDS: dict[str, tuple[str, ...]] = {
    "kfac": (*_COMMON, "authors_code"),
    "rs_kfac": (*_COMMON, *_LOW_RANK),
    "sre_kfac": (*_COMMON, *_LOW_RANK),
    "b_kfac": (*_COMMON, *_LOW_RANK, *_BRAND),
    "b_r_kfac": (*_COMMON, *_LOW_RANK, *_BRAND, "rsvd_interval", "overwrite"),
    "b_kfac_c": (*_COMMON, *_LOW_RANK, *_BRAND, "correction_interval", "correction_share"),
}


def build(kind: str, options: Options, shape: tuple[int, int]) -> KfacReference:
    """The reference under an optimizer's flat options."""
    return KfacReference(
        kind=kind,
        shape=shape,
        steps_per_epoch=options.get("steps_per_epoch"),
        **{key: options[key] for key in _FIELDS[kind]},
    )


def _row(kind: str, paper: Options, sets: dict[str, Options]) -> ReferenceRow:
    return ReferenceRow(
        build=lambda options, shape: build(kind, options, shape),
        paper={**_PAPER, **paper},
        option_sets=sets,
    )


_PAPER: Options = {
    "damping": "0.1",
    "inverse_interval": 1,
    "graft": "none",
    "momentum_site": "direction",
}
_RANDOMIZED: Options = {"rank": 2, "oversampling": 1}
_FORCED: Options = {**_RANDOMIZED, "factor_form": "brand", "brand_interval": 1}

_COMMON_SETS: dict[str, Options] = {
    "paper": {},
    "update_every_third": {"update_interval": 3},
    "inverse_every_third": {"inverse_interval": 3},
    "both_intervals": {"update_interval": 2, "inverse_interval": 4},
    "inverses_between_factors": {"update_interval": 4, "inverse_interval": 2},
    "short_memory": {"factor_decay": 0.5},
    "last_batch": {"factor_decay": 0.0},
    "large_damping": {"damping": "1.0"},
    "damping_schedule": {"damping": "0.1/0.05@step5"},
    "damping_schedule_with_stale_inverses": {"damping": "0.1/0.05@step5", "inverse_interval": 4},
    "authors_code": {"authors_code": True},
    "authors_code_both_intervals": {
        "authors_code": True,
        "update_interval": 2,
        "inverse_interval": 4,
    },
}
_LOW_RANK_SETS: dict[str, Options] = {
    **_COMMON_SETS,
    # Nothing is chosen out of equal eigenvalues where nothing is drawn in excess.
    "without_continuation": {"continuation": False, "oversampling": 0},
    "rank_of_one": {"rank": 1},
    "full_rank": {"rank": 16},
    "full_rank_without_continuation": {"rank": 16, "continuation": False},
    "rank_schedule": {"rank": "3/2@step5/1@step9"},
    "oversampling_schedule": {"oversampling": "0/1@step5/2@step9"},
    "large_oversampling": {"oversampling": 16},
    "no_power_iteration": {"power_iterations": 0, "oversampling": 2},
    "two_power_iterations": {"power_iterations": 2},
    "another_seed": {"seed": 5},
    "adaptive_rank": {"adaptive_rank": True, "rank": 3, "rank_step": 1},
    "adaptive_rank_by_two": {"adaptive_rank": True, "rank": 4, "rank_step": 2, "rank_target": 0.3},
    "adaptive_rank_schedule": {
        "adaptive_rank": True,
        "rank": "3/2@step6/4@step12",
        "rank_step": 1,
        "rank_target": 0.2,
        "inverse_interval": 2,
    },
    "adaptive_rank_that_falls": {
        "adaptive_rank": True,
        "rank": 3,
        "rank_step": 1,
        "rank_target": 1.5,
    },
    "authors_code_adaptive": {"authors_code": True, "rank": 3, "rank_step": 1},
}
_BRAND_SETS: dict[str, Options] = {
    **_COMMON_SETS,
    "rsvd_form": {"factor_form": "rsvd"},
    "rsvd_form_inverse_every_third": {"factor_form": "rsvd", "inverse_interval": 3},
    "rsvd_form_adaptive": {
        "factor_form": "rsvd",
        "adaptive_rank": True,
        "rank": 3,
        "rank_step": 1,
    },
    "auto_form": {"factor_form": "auto"},
    "brand_every_third": {"brand_interval": 3},
    "brand_between_factors": {"brand_interval": 2, "update_interval": 4},
    "without_continuation": {"continuation": False},
    "rank_of_one": {"rank": 1},
    "full_rank": {"rank": 16},
    "rank_schedule": {"rank": "3/2@step5/1@step9"},
    "adaptive_rank": {"adaptive_rank": True, "rank": 3, "rank_step": 1},
    # What comes from the columns is the direction of the gradient, never of its momentum.
    "linear": {"application": "linear"},
    "linear_every_third": {"application": "linear", "brand_interval": 3, "update_interval": 3},
    "another_seed": {"seed": 5},
}
_RSVD_SETS: dict[str, Options] = {
    **_BRAND_SETS,
    "rsvd_every_step": {"rsvd_interval": 1},
    "rsvd_every_third": {"rsvd_interval": 3},
    "rsvd_of_the_factor": {"overwrite": "factor"},
    "rsvd_of_the_factor_every_third": {"overwrite": "factor", "rsvd_interval": 3},
    "rsvd_of_the_factor_every_step": {"overwrite": "factor", "rsvd_interval": 1},
    "rsvd_between_brand": {"brand_interval": 3, "rsvd_interval": 2},
    "rsvd_of_the_factor_between_brand": {
        "overwrite": "factor",
        "brand_interval": 3,
        "rsvd_interval": 2,
    },
    "stale_factor": {"update_interval": 2, "rsvd_interval": 3},
}
_CORRECTION_SETS: dict[str, Options] = {
    **_BRAND_SETS,
    "correction_every_step": {"correction_interval": 1},
    "correction_every_third": {"correction_interval": 3},
    "correction_of_few": {"correction_share": 0.1, "rank": 3},
    "correction_of_all": {"correction_share": 1.0},
    "correction_between_brand": {"brand_interval": 3, "correction_interval": 2},
    "correction_of_a_stale_factor": {"update_interval": 2, "correction_interval": 3},
}
ROWS: dict[str, ReferenceRow] = {
    "kfac": _row("kfac", {}, _COMMON_SETS | {"without_continuation": {"continuation": False}}),
    "rs_kfac": _row("rs_kfac", _RANDOMIZED, _LOW_RANK_SETS),
    "sre_kfac": _row("sre_kfac", _RANDOMIZED, _LOW_RANK_SETS),
    "b_kfac": _row("b_kfac", _FORCED, _BRAND_SETS),
    "b_r_kfac": _row("b_r_kfac", {**_FORCED, "rsvd_interval": 2}, _RSVD_SETS),
    "b_kfac_c": _row("b_kfac_c", {**_FORCED, "correction_interval": 2}, _CORRECTION_SETS),
}
