"""Everything that defines an optimizer but its parameters, learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.fused import check_can_compile
from hf_precond.optim.stages import StageOptions
from hf_precond.preconditioners.base import Preconditioner, check_options, option
from hf_precond.preconditioners.diagonal import Adam, Sgd
from hf_precond.preconditioners.schedule import Schedule

# A rank that is chosen while training.
AUTO = "auto"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupingOptions:
    """How attention kernels become groups."""

    attention_grouping: str = option(
        "head",
        "one group per attention head, or per whole kernel as in the paper",
        choices=("head", "kernel"),
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackOptions:
    """What parameters without a matrix view (norms, biases, embeddings, tied heads) follow."""

    fallback: str = option("adam", "algorithm of the fallback parameters", choices=("adam", "sgd"))
    fallback_eps: float = option(1e-8, "Adam's eps in the fallback", low=0)
    fallback_beta1: float | None = option(
        None,
        "Adam's first decay in the fallback (none: that of betas)",
        low=0,
        high=1,
        high_open=True,
    )
    fallback_momentum: float = option(
        0.9, "momentum of SGD in the fallback", low=0, high=1, high_open=True
    )
    fallback_lr_ratio: float = option(
        1.0, "learning rate of the fallback relative to the group's", low=0, low_open=True
    )

    def __post_init__(self) -> None:
        check_options(self)

    def algorithm(self, beta1: float, beta2: float) -> Preconditioner:
        """Returns the elementwise algorithm these options name."""
        if self.fallback == "sgd":
            return Sgd(momentum=self.fallback_momentum)
        own = beta1 if self.fallback_beta1 is None else self.fallback_beta1
        return Adam(beta1=own, beta2=beta2, eps=self.fallback_eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """What changes along a run."""

    lr_schedule: Schedule = option(
        Schedule.parse(1.0),
        "factor of the learning rate by step or epoch, on top of any scheduler",
        low=0,
    )
    steps_per_epoch: float | None = option(
        None, "optimizer steps of an epoch (the Trainer knows it)", low=0, low_open=True
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsOptions:
    """Precision, faults and the size of stacks."""

    state_dtype: str = option("float32", "dtype of statistics and state", choices=tuple(DTYPES))
    state_storage: str = option(
        "state",
        "dtype of the state between steps: state_dtype, or bfloat16 by stochastic rounding for all "
        "but bases, matrices whose small eigenvalues count, counters and indices",
        choices=("state", "bfloat16"),
    )
    stochastic_rounding: bool = option(
        False,
        "round weights of 16 bits up or down by chance, right in the mean, so that small updates "
        "and decays count",
    )
    compile: bool = option(False, "run the elementwise parts of the step under torch.compile")
    skip_nonfinite: bool = option(
        True,
        "leave out the step of a parameter whose gradient is not finite (one host sync per step)",
    )
    max_failures: int = option(
        10, "failed factorisations or skipped steps in a row before an error", low=1
    )
    bucket_size: int | None = option(
        None,
        "weights per stacked call at most, which bounds the memory of temporaries (none: 2^21 on "
        "CPUs, 2^26 elsewhere)",
        low=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.compile:
            check_can_compile()

    @property
    def dtype(self) -> torch.dtype:
        """``state_dtype`` as torch knows it."""
        return DTYPES[self.state_dtype]

    def stack_limit(self, params: Sequence[Tensor]) -> int:
        """Weights per stacked call, by the device of the first parameter."""
        return self.stack_limit_on(params[0].device.type if params else "meta")

    def stack_limit_on(self, device_type: str) -> int:
        """Weights per stacked call on a kind of device.

        On CPUs calls are cheap, and temporaries above some MiB are fetched from the system and
        given back at every use, page by page.
        """
        if self.bucket_size is not None:
            return self.bucket_size
        return 2**21 if device_type == "cpu" else 2**26

    @property
    def storage_dtype(self) -> torch.dtype:
        """``state_storage`` as torch knows it."""
        return self.dtype if self.state_storage == "state" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingOptions:
    """How several ranks share the work and the state."""

    sharding: str = option(
        "auto",
        "work and state on every rank, each parameter's on one rank, or each matrix's rows spread "
        "over ranks; auto: rows where FSDP2 has cut them, else one rank for what FSDP2 has cut, "
        "every rank otherwise",
        choices=("auto", "replicated", "owner", "blocks"),
    )
    exchange_dtype: str | None = option(
        None,
        "dtype of directions that go from the rank that makes them to the others (none: that of "
        "the state)",
        choices=("bfloat16", "float32"),
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How ranks are chosen under ``rank="auto"``."""

    state_budget: float | None = option(
        None,
        "optimizer state over which rank='auto' chooses each matrix's rank, in multiples of "
        "AdamW's (none: what the default rank would take)",
        low=0,
        low_open=True,
    )
    rank_interval: int = option(200, "steps between choices of the ranks under rank='auto'", low=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named algorithm with all its options resolved: what the registry makes of a name and
    options.

    Attributes:
        name: registry name.
        betas: decay of the first and second moments.
        adapts_rank: whether each view has a rank of its own, chosen while training; that of the
            algorithm is the one to begin with.
    """

    name: str
    betas: tuple[float, float]
    algorithm: Preconditioner
    stages: StageOptions
    grouping: GroupingOptions
    fallback: FallbackOptions
    schedules: ScheduleOptions
    numerics: NumericsOptions
    sharding: ShardingOptions
    ranks: RankOptions = RankOptions()
    adapts_rank: bool = False

    @property
    def fallback_algorithm(self) -> Preconditioner:
        """The algorithm of parameters without a matrix view."""
        return self.fallback.algorithm(*self.betas)

    @property
    def min_block_size(self) -> int:
        """Smallest block size at which the algorithm works at full rank; 1 where it has no rank."""
        return int(getattr(self.algorithm, "min_block_size", 1))

    def hyperparameters(self) -> dict[str, Any]:
        """Returns all options flat, as plain data, with what the name fixes."""
        flat: dict[str, Any] = {"betas": list(self.betas)}
        parts = (
            self.algorithm,
            self.stages,
            self.grouping,
            self.fallback,
            self.schedules,
            self.numerics,
            self.sharding,
            *((self.ranks,) if self.adapts_rank else ()),
        )
        for part in parts:
            for item in fields(part):
                if item.name not in {"beta1", "beta2"}:
                    value = getattr(part, item.name)
                    flat[item.name] = str(value) if isinstance(value, Schedule) else value
        if self.adapts_rank:
            flat["rank"] = AUTO
        return flat
