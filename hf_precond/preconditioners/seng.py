"""SENG: the natural gradient of per-sample gradients, inverted in the space of the samples.

Yang, Xu, Wen, Chen, Xu: Sketchy empirical natural gradient methods (2021), as the benchmark of
Puiu, Brand New K-FACs (2022). With U = [vec(G_1), ..., vec(G_N)] / sqrt(N),

    d = (g - U (lam I + U^T U)^(-1) U^T g) / lam,

which is (lam I + U U^T)^(-1) g by the formula of Sherman, Morrison and Woodbury. U is kept as the
inputs and output gradients of its samples; inside the inverse it may be estimated from
``sample_size`` of a layer's outputs and as many of its inputs.

    inputs   [G, n, B]   outputs  [G, n, M]   of n = ``max_columns`` positions at most
    owner    [G, n]      number of the sample that a position belongs to
    inverse  [G, n, n]   (lam I + U^T U)^(-1) over samples
    count    [G]         N                    shift  [G]  lam; zero before anything was seen
    input_picks, output_picks  [G, sample_size]  which inputs and outputs were drawn
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.precision import flushed
from hf_precond.linalg.roots import largest_eigenvalue, positive_inverse
from hf_precond.preconditioners.base import (
    LayerNeeds,
    OptimizerInfo,
    Shape,
    State,
    StepContext,
    check_options,
    is_due,
    option,
)
from hf_precond.preconditioners.sample_grams import drawn_without_replacement, inner_products
from hf_precond.preconditioners.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Seng:
    """Sketchy empirical natural gradient."""

    exact_state: ClassVar[tuple[str, ...]] = ("owner", "count", "input_picks", "output_picks")

    damping: Schedule = option(
        Schedule.parse(2.0),
        "added to the eigenvalues of the per-sample gradients' second moment",
        symbol="lambda",
        low=0,
        low_open=True,
    )
    damping_mode: str = option(
        "absolute",
        "damping as it is, or as a share of the largest eigenvalue",
        choices=("absolute", "relative"),
    )
    update_interval: int = option(200, "steps between new samples", low=1)
    sample_size: int | None = option(
        128, "inputs and outputs of a layer that the inverse is made from (none: all)", low=1
    )
    max_columns: int = option(
        512, "positions of whole samples that are kept of a batch at most", low=1
    )
    seed: int = option(0, "seed of all draws", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def layer_needs(self) -> LayerNeeds:
        """Whole samples."""
        return LayerNeeds(max_columns=self.max_columns, by_sample=True, seed=self.seed)

    def captures_at(self, step: int) -> bool:
        """Whether a step's samples are wanted."""
        return is_due(step, self.update_interval)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        n = self.max_columns
        sizes: dict[str, tuple[int, ...]] = {
            "inputs": (n, columns),
            "outputs": (n, rows),
            "owner": (n,),
            "inverse": (n, n),
            "count": (),
            "shift": (),
            "input_picks": (self._picked(columns),),
            "output_picks": (self._picked(rows),),
        }
        return {
            name: torch.zeros(groups, *size, dtype=dtype, device=device)
            for name, size in sizes.items()
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        if ctx.columns is None or not ctx.due(self.update_interval):
            return
        groups, samples, length = ctx.columns.inputs.shape[:3]
        if samples * length > self.max_columns:
            raise ValueError(
                f"max_columns = {self.max_columns} is less than the {length} positions of one "
                "sample: SENG keeps at least one whole sample"
            )
        inputs, outputs = (self._filled(x) for x in ctx.columns.flat())
        owner = torch.arange(samples, device=inputs.device).repeat_interleave(length)
        owner = torch.cat([owner, owner.new_zeros(self.max_columns - len(owner))])
        new = {
            "inputs": inputs,
            "outputs": outputs,
            "owner": owner.to(inputs.dtype).expand(groups, -1),
            "count": inputs.new_full((groups,), samples),
            **self._drawn(g_GMB.shape, ctx.step, inputs),
        }
        some_inputs, some_outputs = self._sampled(new)
        inner = _by_owner(inner_products(some_outputs, some_inputs), new["owner"])
        inner = _by_owner(inner.mT, new["owner"]) * samples
        shift = inner.new_full((groups,), ctx.value(self.damping))
        if self.damping_mode == "relative":
            shift = shift * flushed(largest_eigenvalue(inner))
        alive = torch.where(shift > 0, shift, torch.ones_like(shift))
        diagonal = torch.diag_embed(alive.unsqueeze(-1).expand(inner.shape[:-1]))
        new |= {"inverse": positive_inverse(inner + diagonal), "shift": shift}
        # Written only when all is computed: a failed factorisation leaves all as it was.
        for name, tensor in new.items():
            state[name].copy_(tensor)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        rows, columns = state["output_picks"].long(), state["input_picks"].long()
        some_inputs, some_outputs = self._sampled(state)
        part = g_GMB.gather(1, rows.unsqueeze(-1).expand(-1, -1, g_GMB.shape[2]))
        part = part.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))
        part = part * self._scale(g_GMB.shape[1]) * self._scale(g_GMB.shape[2])
        root = state["count"].sqrt()[:, None, None]
        at_positions = ((some_outputs @ part) * some_inputs).sum(-1, keepdim=True)
        by_sample = _by_owner(at_positions, state["owner"]) * root
        weights = (state["inverse"] @ by_sample).gather(1, state["owner"].long().unsqueeze(-1))
        low_rank = (state["outputs"] * weights * root).mT @ state["inputs"]
        shift = state["shift"][:, None, None]
        alive = shift > 0
        safe = torch.where(alive, shift, torch.ones_like(shift))
        return torch.where(alive, (g_GMB - low_rank) / safe, g_GMB)

    def _picked(self, size: int) -> int:
        return size if self.sample_size is None else min(size, self.sample_size)

    def _scale(self, size: int) -> float:
        return float((size / self._picked(size)) ** 0.5)

    def _filled(self, x_GNK: Tensor) -> Tensor:
        """Zero rows up to ``max_columns``: samples that are not there."""
        missing = self.max_columns - x_GNK.shape[1]
        return torch.cat([x_GNK, x_GNK.new_zeros(x_GNK.shape[0], missing, x_GNK.shape[2])], 1)

    def _drawn(self, shape: torch.Size, step: int, like: Tensor) -> State:
        """The inputs and outputs that the inverse is made from."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        picks = {}
        for name, size in (("input_picks", shape[2]), ("output_picks", shape[1])):
            drawn = drawn_without_replacement(size, self.sample_size, generator, like.device)
            picks[name] = drawn.to(like.dtype).expand(shape[0], -1)
        return picks

    def _sampled(self, state: State) -> tuple[Tensor, Tensor]:
        """Drawn inputs and outputs of the kept positions, scaled to stand for all."""
        found = []
        for side in ("input", "output"):
            x, picks = state[f"{side}s"], state[f"{side}_picks"].long()
            index = picks.unsqueeze(1).expand(-1, x.shape[1], -1)
            found.append(x.gather(2, index) * self._scale(x.shape[2]))
        return found[0], found[1]


def _by_owner(x_GNL: Tensor, owner: Tensor) -> Tensor:
    """Sums rows of positions into the rows of the samples they belong to."""
    index = owner.long().unsqueeze(-1).expand_as(x_GNL)
    return torch.zeros_like(x_GNL).scatter_add_(1, index, x_GNL)


INFOS = (
    OptimizerInfo(
        name="seng",
        algorithm=Seng,
        defaults={
            "damping": Schedule.parse(0.1),
            "damping_mode": "relative",
            "update_interval": 10,
            "graft": "adam",
            "momentum_site": "gradient",
            "attention_grouping": "kernel",
        },
        summary="natural gradient of per-sample gradients, inverted between samples",
        formula=(
            "F sums u_i u_i^T of single samples' gradients u_i = b_i a_i^T. The direction is (F "
            "+ damping)^(-1) M, inverted between the samples."
        ),
        paper="Yang et al., SENG, 2021; Puiu, Brand New K-FACs, 2022, section 6",
    ),
)
