"""From samples of a few training steps to figures, and from figures to advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
from torch import Tensor

from trainer_ext.diagnostics import measures
from trainer_ext.diagnostics.collect import KernelSamples
from trainer_ext.diagnostics.measures import Errors, SharedBasisRun

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
ENOUGH = 0.2
"""A rank is enough where a shared basis misses at most this share of the trace."""
# Ranks that differ by this factor are no longer one rank.
_APART = 4
# What bases for each head must save at least, as a share of the squared second moments.
_WORTH_BASES = 0.02
MOST_ONLINE = 32
"""Algorithm 1 is run at ranks up to this: its cost grows with the square."""
HELD = 0.8
"""Share of the singular values that paper 001's Figure 2 speaks of."""
METHODS: Mapping[str, str] = {
    "separate": "a basis for each block",
    "shared": "one basis for all blocks",
    "online": "one basis, gradient after gradient",
    "frequent directions": "frequent directions for each block",
    "block diagonal": "blocks of this size (1: the diagonal)",
}
ROTATIONS = ("as it is", "one side rotated", "both sides rotated")


@dataclass(frozen=True, kw_only=True)
class KernelFindings:
    """What a kernel's samples say.

    Attributes:
        shape: (G, M, B) of the whole kernel.
        sampled: rows and columns that were looked at.
        block_shares: ordering -> how much more the second moments hold inside their blocks than an
            equal number of entries elsewhere.
        errors: method -> rank -> relative error.
        head_errors: with a basis for each head, and with one for all of the same heads.
        trace_missed: rank -> share of the trace outside of one basis for all blocks.
        run: Algorithm 1's own figures.
        spectrum: singular values of the inputs as shares of their sum, descending.
        off_diagonal: rotation -> share of the squared second moments off the diagonal.
    """

    name: str
    shape: tuple[int, int, int]
    head_shape: tuple[int, int, int] | None
    sampled: tuple[int, int]
    block_shares: dict[str, float]
    errors: dict[str, Errors]
    trace_missed: Errors
    head_errors: dict[str, Errors]
    run: SharedBasisRun
    spectrum: list[float]
    off_diagonal: dict[str, float]

    @property
    def input_rank(self) -> int | None:
        """Singular values that hold 80 % of their sum; None where inputs are not known."""
        if not self.spectrum:
            return None
        return measures.rank_holding(torch.tensor(self.spectrum, dtype=torch.float64), HELD)

    @property
    def enough(self) -> int | None:
        """The smallest rank tried that is enough."""
        return next((rank for rank, share in self.trace_missed.items() if share <= ENOUGH), None)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is shown entry by entry.

    Attributes:
        structure: ordering -> second moments of a few weights.
        off_diagonal: rotation -> their off-diagonal entries.
    """

    structure: dict[str, Tensor]
    off_diagonal: dict[str, Tensor]


@dataclass(kw_only=True)
class Window:
    """Findings of consecutive steps of a training run.

    Attributes:
        first: the first step, from 1.
        steps: how many gradients there are of it.
        skipped: steps left out because their gradients were not finite.
        rank: at which Algorithm 1 was run.
        kfac: layer -> variant -> metric -> values, one a step.
    """

    first: int
    steps: int
    skipped: int
    rank: int
    kernels: list[KernelFindings]
    pictures: dict[str, Pictures] = field(default_factory=dict)
    kfac: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)


def look_at(samples: KernelSamples, *, rank: int, picture: int) -> tuple[KernelFindings, Pictures]:
    """Figures and pictures of one kernel.

    Args:
        rank: at which Algorithm 1 is run, or the block size where that is less.
        picture: outputs and inputs of what is shown entry by entry.
    """
    g_TGMB = samples.g_TGMB
    g_TOI = samples.picture(picture)
    rotated = {
        label: torch.stack(steps).flatten(1)
        for label, steps in zip(
            ROTATIONS, (list(g_TOI), samples.one_sided, samples.two_sided), strict=True
        )
        if steps
    }
    orderings = {"by outputs": g_TOI, "by inputs": g_TOI.mT}
    ranks = [each for each in RANKS if each <= g_TGMB.shape[-1]]
    findings = KernelFindings(
        name=samples.name,
        shape=samples.shape,
        head_shape=samples.head_shape,
        sampled=(g_TGMB.shape[2], g_TGMB.shape[3]),
        block_shares={name: measures.block_share(g) for name, g in orderings.items()},
        errors={
            "separate": measures.separate_errors(g_TGMB, ranks),
            "shared": measures.shared_errors(g_TGMB, ranks),
            "online": measures.online_errors(g_TGMB, [k for k in ranks if k <= MOST_ONLINE]),
            "frequent directions": measures.frequent_directions_errors(g_TGMB, ranks),
            "block diagonal": measures.block_diagonal_errors(g_TGMB, ranks),
        },
        trace_missed=measures.shared_trace_missed(g_TGMB, ranks),
        head_errors=head_errors(samples),
        run=measures.run_shared_basis(g_TGMB, rank),
        spectrum=spectrum(samples.inputs),
        off_diagonal={label: measures.off_diagonal_share(g_TN) for label, g_TN in rotated.items()},
    )
    pictures = Pictures(
        structure={name: measures.second_moment_image(g) for name, g in orderings.items()},
        off_diagonal={label: measures.off_diagonal(g_TN) for label, g_TN in rotated.items()},
    )
    return findings, pictures


def head_errors(samples: KernelSamples) -> dict[str, Errors]:
    """Errors with a basis for each head, and with one for all of them where blocks stay the same.

    The heads of an output kernel lie along its inputs: its blocks are others without heads.
    """
    if samples.head_shape is None:
        return {}
    g_TGMB = torch.stack(samples.heads)
    ranks = [rank for rank in RANKS if rank <= g_TGMB.shape[-1]]
    found = {"a basis for each head": measures.shared_errors(g_TGMB, ranks)}
    if samples.head_shape[2] == samples.shape[2]:
        merged = g_TGMB.flatten(1, 2).unsqueeze(1)
        found["one basis for all heads"] = measures.shared_errors(merged, ranks)
    return found


def spectrum(inputs: Sequence[Tensor]) -> list[float]:
    """Singular values of what a layer has seen, as shares of their sum."""
    if not inputs:
        return []
    return measures.singular_values(torch.cat(list(inputs))).tolist()


# --- advice ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Sentences for the choice of an optimizer's options, and what they come to.

    Attributes:
        rank: that is enough for three quarters of the kernels, or the largest tried.
        grouping: ``attention_grouping``; None without attention heads.
    """

    rank: int
    grouping: str | None
    sentences: tuple[str, ...]

    @property
    def optim_args(self) -> str:
        """As ``--optim_args`` takes it."""
        grouping = [f"attention_grouping={self.grouping}"] if self.grouping else []
        return ",".join([f"rank={self.rank}", *grouping])


def advise(window: Window) -> Advice:
    """What the findings mean for rank, grouping and method."""
    kernels = window.kernels
    rank, of_rank = rank_advice(kernels)
    grouping, of_grouping = grouping_advice(kernels, rank)
    sentences = [
        *of_rank,
        *of_grouping,
        *structure_advice(kernels),
        *rotation_advice(kernels),
        *run_advice(window),
        *kfac_advice(window),
    ]
    return Advice(rank=rank, grouping=grouping, sentences=tuple(sentences))


def rank_advice(kernels: Sequence[KernelFindings]) -> tuple[int, list[str]]:
    """The rank, and why."""
    largest = max(max(kernel.trace_missed) for kernel in kernels)
    wanted = sorted(kernel.enough or largest for kernel in kernels)
    rank = wanted[(3 * len(wanted) - 1) // 4]
    missed = fmean(at_rank(kernel.trace_missed, rank) for kernel in kernels)
    served = sum(at_rank(kernel.trace_missed, rank) <= ENOUGH for kernel in kernels)
    errors = {
        name: fmean(at_rank(kernel.errors[name], rank) for kernel in kernels)
        for name in ("shared", "separate", "block diagonal")
    }
    adam = fmean(kernel.errors["block diagonal"][1] for kernel in kernels)
    found = [
        f"A shared basis of rank {rank} leaves at most {ENOUGH:.0%} of the trace of the second "
        f"moments outside in {served} of {len(kernels)} kernels, {missed:.0%} in the mean.",
        f"Its relative (squared) error is {errors['shared']:.1%}; a basis for each block would "
        f"have {errors['separate']:.1%}, blocks of size {rank} {errors['block diagonal']:.0%}, and "
        f"the diagonal that Adam keeps {adam:.0%}. The squares are mostly those of a few large "
        "directions.",
    ]
    if wanted[-1] >= _APART * wanted[0]:
        found.append(
            f"Single kernels need from {wanted[0]} to {wanted[-1]} columns for that: rank=auto "
            "gives each its own, within one budget of state (state_budget)."
        )
    ranks = [kernel.input_rank for kernel in kernels if kernel.input_rank is not None]
    if ranks:
        counts = [len(kernel.spectrum) for kernel in kernels if kernel.spectrum]
        share = median(own / count for own, count in zip(ranks, counts, strict=True))
        verdict = (
            "so a small basis sees most of what a gradient can be"
            if share <= 0.25
            else "so no small basis sees all of what a gradient can be"
        )
        found.append(
            f"The inputs of these layers have {HELD:.0%} of their singular values in the largest "
            f"{share:.0%} (median), {verdict}."
        )
    return rank, found


def grouping_advice(kernels: Sequence[KernelFindings], rank: int) -> tuple[str | None, list[str]]:
    """``attention_grouping``, and why."""
    pairs = [
        tuple(at_rank(errors, rank) for errors in kernel.head_errors.values())
        for kernel in kernels
        if len(kernel.head_errors) == 2
    ]
    if not pairs:
        return None, []
    by_head, together = (fmean(column) for column in zip(*pairs, strict=True))
    grouping = "head" if by_head < min(0.75 * together, together - _WORTH_BASES) else "kernel"
    reason = (
        "enough to pay for the further bases"
        if grouping == "head"
        else "not enough to pay for the further bases"
    )
    return grouping, [
        f"With a basis for each attention head the same rank misses {by_head:.0%} of the query, "
        f"key and value kernels instead of {together:.0%}: {reason} "
        f"(attention_grouping={grouping})."
    ]


def structure_advice(kernels: Sequence[KernelFindings]) -> list[str]:
    """Whether blocks by output neurons are the right ones."""
    outputs, inputs = (
        fmean(kernel.block_shares[name] for kernel in kernels)
        for name in ("by outputs", "by inputs")
    )
    better = "outputs" if outputs >= inputs else "inputs"
    remark = (
        "as the block structure of this project assumes"
        if better == "outputs"
        else "so a method that scales both sides (two_sided_basis, soap, muon) may fit better"
    )
    return [
        f"Entries of the second moments inside the blocks of an output neuron are {outputs:.1f} "
        f"times as large (squared) as the mean entry, inside those of an input {inputs:.1f} "
        f"times: the blocks are clearer by {better}, {remark}."
    ]


def rotation_advice(kernels: Sequence[KernelFindings]) -> list[str]:
    """What the rotations of AdaDiag and SOAP would do."""
    rotated = [kernel for kernel in kernels if len(kernel.off_diagonal) == len(ROTATIONS)]
    if not rotated:
        return []
    plain, one, both = (
        fmean(kernel.off_diagonal[label] for kernel in rotated) for label in ROTATIONS
    )
    verdict = (
        "the rotation makes a diagonal method see more"
        if both < 0.9 * plain
        else "the rotation of the first gradient does not stay useful over this many steps"
    )
    return [
        f"Off the diagonal lie {plain:.0%} of the (squared) second moments, {one:.0%} with one "
        f"side and {both:.0%} with both sides turned to the singular vectors of the first "
        f"gradient (adadiag, soap): {verdict}."
    ]


def run_advice(window: Window) -> list[str]:
    """How Algorithm 1 has done."""
    escaped = fmean(kernel.run.escaped[-1] for kernel in window.kernels)
    alignment = fmean(kernel.run.alignment[-1] for kernel in window.kernels)
    return [
        f"Algorithm 1 at rank {window.rank} counts {escaped:.0%} of the trace as escaped mass "
        f"after {window.steps} steps; Q_T is {alignment:.2f} (1: all blocks have the same leading "
        "eigenvectors; near 0 the bound of Theorem 3 says nothing)."
    ]


def kfac_advice(window: Window) -> list[str]:
    """How far K-FAC variants are from K-FAC that is always up to date."""
    found: dict[str, list[float]] = {}
    for variants in window.kfac.values():
        for label, metrics in variants.items():
            found.setdefault(label, []).extend(metrics["step"])
    # Steps with gradients that are not finite have no metrics.
    seen = {label: fmean(values) for label, values in found.items() if values}
    if not seen:
        return []
    steps = ", ".join(f"{label} {mean:.0%}" for label, mean in seen.items())
    return [f"Steps of K-FAC variants differ from those of K-FAC at every step by: {steps}."]


def at_rank(errors: Errors, rank: int) -> float:
    """The error at a rank, or at the largest below it."""
    return errors[max(each for each in errors if each <= rank)]
