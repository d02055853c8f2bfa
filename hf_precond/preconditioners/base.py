"""What an algorithm is: a frozen bag of hyperparameters and three functions on stacked matrices.

An algorithm never sees a parameter, a module, a learning rate or a rank: it works on ``[G, M, B]``
gradients (G independent groups of M blocks of size B) and on a dict of state tensors that all have
leading dimension G. From that follow, for every algorithm at once: stacking equal shapes of all
layers and heads into one batched call, slicing state per parameter, parameters without a gradient,
safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from math import inf
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_precond.preconditioners.schedule import Schedule

Shape = tuple[int, int, int]
State = dict[str, Tensor]

# Roles of a view, see Placement.
MAIN, GRAFT, FALLBACK = "main", "graft", "fallback"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNeeds:
    """What an algorithm wants to know of its layers' inputs and output gradients.

    Attributes:
        max_columns: positions kept of a batch at most (None: all), drawn without replacement.
        by_sample: draw whole samples, so that per-sample gradients stay whole.
        reduce: one column per sample, its mean input and the sum of its output gradients, in place
            of one per position (Eschenhagen et al. 2023, K-FAC-reduce and -expand).
        joint_bias: whether a bias is trained together with its layer's weight.
        form_gradient: whether the backward pass forms the gradient of the weights, too.
        seed: of the draw.
    """

    max_columns: int | None = None
    by_sample: bool = False
    reduce: bool = False
    joint_bias: bool = True
    form_gradient: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Inputs and output gradients of G groups over N samples of S positions.

    Scaled with T, the positions of the whole batch: inputs a / sqrt(T), output gradients
    g * sqrt(T), both times sqrt(N / n) where only n were drawn. So their product over all positions
    is the gradient ``[M, B]``, and neither Gram matrix depends on the batch size.

    Attributes:
        inputs: ``[G, N, S, B]``; zero at padded positions; the input of a joint bias is one.
        outputs: ``[G, N, S, M]``.
        complete: every position of the whole batch on every process is there.
        alone: no gradient was formed; what an algorithm gets in its place is zero.
        clip: factor of the gradient that its clipping asks for, where it is alone.
    """

    inputs: Tensor
    outputs: Tensor
    complete: bool = True
    alone: bool = False
    clip: float | Tensor = 1.0

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """What columns must have in common to be stacked."""
        samples, positions = self.inputs.shape[1:3]
        return samples, positions, self.complete, self.alone

    def flat(self) -> tuple[Tensor, Tensor]:
        """Returns inputs ``[G, N*S, B]`` and outputs ``[G, N*S, M]``, positions as rows."""
        return self.inputs.flatten(1, 2), self.outputs.flatten(1, 2)

    def gradient(self) -> Tensor:
        """Returns the product of the columns, ``[G, M, B]``."""
        inputs, outputs = self.flat()
        return outputs.mT @ inputs

    def select(self, groups: slice) -> Columns:
        """Returns the columns of some groups."""
        return replace(self, inputs=self.inputs[groups], outputs=self.outputs[groups])

    @staticmethod
    def stack(parts: Sequence[Columns]) -> Columns:
        """Stacks columns of one kind over their groups."""
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            inputs=torch.cat([part.inputs for part in parts]),
            outputs=torch.cat([part.outputs for part in parts]),
            complete=all(part.complete for part in parts),
        )


@dataclass(slots=True, kw_only=True)
class StepContext:
    """What an algorithm may know about the step it is part of.

    Attributes:
        step: 1 for the first step of the groups in this call.
        phases: for each group a share in [0, 1) of an interval, spread over all groups of the
            optimizer by cost: when a staggered refresh of the group is due.
        steps_per_epoch: for schedules by epoch; unknown in a plain loop that does not say.
        moment: what is to be preconditioned in this step, ``[G, M, B]``: the gradient or its first
            moment; None where nobody says, as for a gradient alone.
        columns: what the layers have seen; None on steps that need none, or where a layer was not
            used.
        refreshed: whether anything has been due so far; read by the shell.
    """

    step: int
    phases: Sequence[float] = ()
    steps_per_epoch: float | None = None
    moment: Tensor | None = None
    columns: Columns | None = None
    refreshed: bool = False

    def due(self, interval: int, *, refreshes: bool = True) -> bool:
        """True at steps 1, 1 + interval, 1 + 2 * interval, ...

        Args:
            refreshes: whether what is due can fail, so that going well ends a streak of failures.
        """
        due = is_due(self.step, interval)
        self.refreshed |= due and refreshes
        return due

    def due_groups(self, interval: int, *, first: int, stagger: bool) -> list[int] | slice | None:
        """The groups to refresh now: at steps first, first + interval, ... or staggered after it.

        Returns:
            ``None`` for no group, a full slice for all, else the indices of some. Staggered, a
            group has its turn at ``first + floor(phase * interval)`` and every ``interval`` later.
        """
        since = self.step - first
        if not stagger:
            due = since >= 0 and since % interval == 0
            self.refreshed |= due
            return slice(None) if due else None
        # A phase is a quotient: a hair below a whole number is that number.
        turns = [since - int(phase * interval + 1e-6) for phase in self.phases]
        groups = [index for index, turn in enumerate(turns) if turn >= 0 and turn % interval == 0]
        self.refreshed |= bool(groups)
        return groups or None

    def epoch(self) -> float:
        """Epochs done before this step.

        Raises:
            ValueError: if nobody has said how many steps an epoch has.
        """
        if self.steps_per_epoch is None:
            raise ValueError(
                "a schedule by epoch needs steps_per_epoch: the Trainer sets it where the data set "
                "has a length, elsewhere give the option steps_per_epoch"
            )
        return (self.step - 1) / self.steps_per_epoch

    def value(self, schedule: Schedule) -> float:
        """The value of a schedule at this step."""
        return schedule.at(self.step, self.epoch)


@dataclass(frozen=True, slots=True)
class SumOverBlocks:
    """Asks for sums over the ranks that share the M axis of tensors ``[G, ...]``.

    What follows the first dimension may depend on the block size, not on M.
    """

    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class FromOneRank:
    """Asks for one rank's result in place of everybody's own, so that all have the same bits.

    Two processes may round a factorisation of the same matrix differently. ``tensors`` are
    ``[G, ...]``, or ``[G, M, ...]`` where ``per_block``.
    """

    tensors: tuple[Tensor, ...]
    per_block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaresTakenIn:
    """What becomes of a second moment that takes in squares: decay * itself + weight * x^2.

    Written in place once all is well, so no tensor of its size is made for the new value.
    """

    x: Tensor
    decay: float
    weight: float


NewState = dict[str, "Tensor | SquaresTakenIn"]
Rounds = Generator["SumOverBlocks | FromOneRank", tuple[Tensor, ...], NewState]
"""An update that asks other ranks on its way and returns the state it would write."""


def commit(state: State, new: NewState) -> None:
    """Writes what an update has computed.

    Only when all of it is there: after a failed factorisation the old state still fits together.
    """
    for name, value in new.items():
        if isinstance(value, SquaresTakenIn):
            state[name].mul_(value.decay).addcmul_(value.x, value.x, value=value.weight)
        else:
            state[name].copy_(value)


def alone(rounds: Rounds) -> NewState:
    """Runs an update where this process has all blocks: every answer is the question."""
    answer: tuple[Tensor, ...] | None = None
    while True:
        try:
            answer = (next(rounds) if answer is None else rounds.send(answer)).tensors
        except StopIteration as end:
            new: NewState = end.value
            return new


def is_due(step: int, interval: int) -> bool:
    """True at steps 1, 1 + interval, 1 + 2 * interval, ..."""
    return (step - 1) % interval == 0


@runtime_checkable
class Preconditioner(Protocol):
    """A frozen dataclass whose fields are the hyperparameters of one algorithm.

    One that has the class attribute ``rows_may_split`` works where the blocks of a group lie on
    several ranks: its blocks are independent, or its update has a form ``update_in_rounds(state, g,
    ctx) -> Rounds`` that names every sum over blocks.
    """

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        """Allocates the state of G groups; every tensor has leading dimension G."""
        ...

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        """Takes the gradient into the statistics, in place, when due. Called on every step."""
        ...

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        """Returns the descent direction for ``g_GMB`` (same shape). Changes no statistics."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an algorithm wants a view ``[G, M, B]`` of a parameter.

    Attributes:
        role: ``"main"``, the algorithm; ``"graft"``, the graft partner's step alone;
            ``"fallback"``, the elementwise algorithm of parameters without a view.
        tile: rows and columns of the tiles the matrices are cut into, the last ones smaller.
        reason: why not ``"main"``, for logs and the explanation table.
    """

    role: str = MAIN
    tile: tuple[int, int] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """How the trace of second moments falls over the columns of a basis of one group.

    Attributes:
        inside: share of each column of the basis, largest first.
        outside: share of all other directions together.
        num_outside: how many these are.
    """

    inside: tuple[float, ...]
    outside: float
    num_outside: int


@runtime_checkable
class RankAdaptive(Protocol):
    """An algorithm whose state can be carried over to another rank while it trains.

    What it knows of a group's spectrum is a list of tensors ``[G, ...]``. That of a part of the
    blocks adds up with that of the others.
    """

    @property
    def rank(self) -> int | None:
        """Columns of a basis; None: chosen by the view's shape."""
        ...

    def max_rank(self, shape: Shape) -> int:
        """Largest rank that a view ``[G, M, B]`` can have."""
        ...

    def sums_for_ranks(self, state: State, moment: Tensor | None) -> list[Tensor]:
        """What the spectra are made of, summed over the blocks at hand.

        Args:
            moment: averaged gradient ``[G, M, B]``, where there is one: it knows of a new column
                sooner than second moments of long memory.
        """
        ...

    def turns_for_ranks(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """What is factorised of the sums over all blocks; one rank's is everybody's."""
        ...

    def spectra(self, turns: Sequence[Tensor], shape: Shape) -> list[list[Spectrum]]:
        """For each group its spectra, one for each side that has a basis."""
        ...

    def resized(self, state: State, turns: Sequence[Tensor], rank: int) -> State:
        """The state under another rank: the columns that hold least are given up, new ones are
        chosen by seed and hold what the state knows of their directions."""
        ...


def placement(algorithm: Preconditioner, shape: Shape) -> Placement:
    """Asks an algorithm for the placement of a view; one without an opinion takes it whole."""
    place = getattr(algorithm, "place", None)
    return Placement() if place is None else place(shape)


def exact_state(algorithm: Preconditioner) -> tuple[str, ...]:
    """Names of the state tensors that an algorithm wants with all their bits, as it declares them:
    bases, matrices whose small eigenvalues count, counters and indices."""
    return getattr(algorithm, "exact_state", ())


def layer_needs(algorithm: Preconditioner) -> LayerNeeds | None:
    """What an algorithm wants to know of its layers; None for one that needs gradients only."""
    return getattr(algorithm, "layer_needs", None)


def captures_at(algorithm: Preconditioner, step: int) -> bool:
    """Whether an algorithm wants the columns of a step."""
    wants = getattr(algorithm, "captures_at", None)
    return wants is not None and bool(wants(step))


def option(
    default: Any,
    help: str,
    *,
    symbol: str = "",
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
    choices: tuple[str, ...] = (),
    word: str = "",
) -> Any:
    """A dataclass field that is a hyperparameter: help, paper symbol, allowed values.

    Args:
        word: given in place of a value, it leaves the value to the optimizer.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "symbol": symbol,
            "low": low,
            "high": high,
            "low_open": low_open,
            "high_open": high_open,
            "choices": choices,
            "word": word,
        },
    )


def allowed_values(metadata: Mapping[str, Any]) -> str:
    """Returns the allowed values of an :func:`option` in words, for messages and help."""
    if metadata.get("choices"):
        return "one of " + ", ".join(repr(choice) for choice in metadata["choices"])
    low, high = metadata.get("low"), metadata.get("high")
    parts = []
    if low is not None:
        parts.append(f"{'>' if metadata['low_open'] else '>='} {low:g}")
    if high is not None:
        parts.append(f"{'<' if metadata['high_open'] else '<='} {high:g}")
    word = metadata.get("word")
    return " and ".join(parts) + (f", or {word!r}" if word else "")


def check_options(options: Any) -> None:
    """Checks every :func:`option` of a dataclass instance against its allowed values.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for item in fields(options):
        value, meta = getattr(options, item.name), item.metadata
        if value is None or not meta:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(value, Schedule):
            values = value.values
        if not all(_is_allowed(part, meta) for part in values):
            finite = " and finite" if inf in values else ""
            raise ValueError(
                f"{item.name} = {_shown(value)} is not allowed: "
                f"it must be {allowed_values(meta)}{finite}"
            )


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Schedule) else repr(value)


def _is_allowed(value: Any, meta: Mapping[str, Any]) -> bool:
    if meta.get("choices"):
        return value in meta["choices"]
    low, high = meta.get("low"), meta.get("high")
    if low is not None and not (value > low if meta["low_open"] else value >= low):
        return False
    if low is not None and high is None:
        return bool(value < inf)
    return high is None or (value < high if meta["high_open"] else value <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerInfo:
    """One row of the registry: everything the CLI, the docs and the test suite know of an
    optimizer.

    Attributes:
        name: the public name, as in ``--optim NAME``.
        algorithm: the dataclass of the algorithm's hyperparameters.
        defaults: defaults of this row that differ from the dataclasses' own.
        fixed: algorithm fields that make this row what it is; not options of it.
        summary: one line for help texts.
        formula: what is kept and what becomes of a gradient, in words.
        paper: citation with equation or algorithm number.
        exemptions: law name -> written reason why the law does not apply.
    """

    name: str
    algorithm: Callable[..., Preconditioner]
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    summary: str
    formula: str
    paper: str
    exemptions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def field_default(item: Any) -> Any:
    """Returns the default of a dataclass field (``None`` where it has none)."""
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None
