"""Memory, work and traffic of an optimizer on a mesh of ranks, planned without any of them.

Who works on what is the plan of :func:`hf_precond.optim.work.plan_work` itself. State and
operations follow from the shapes of every rank's stacks; temporaries and traffic from the step of
one rank, run on the meta device (:mod:`trainer_ext.planned_rank`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.optim.banks import Bank
from hf_precond.optim.health import Health
from hf_precond.optim.layout import owner_counts, pieces_of
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.optim.options import Recipe
from hf_precond.optim.pipeline import (
    Cohort,
    Scope,
    Updates,
    run,
    split_into_cohorts,
    update_alone,
)
from hf_precond.optim.roles import algorithm_of, init_stack
from hf_precond.optim.work import HERE, Home, Share, SumKind, Work, plan_work, sum_kind
from hf_precond.preconditioners.base import MAIN, Columns, captures_at, layer_needs
from hf_precond.views.plan import Key, PlannedView, plan_buckets
from hf_precond.views.shards import chunk_ranges
from hf_precond.views.view import rows
from trainer_ext.build import build_optimizer
from trainer_ext.dry_run import DryRun, Operations
from trainer_ext.planned_rank import (
    META,
    Place,
    PlannedOptimizer,
    Sent,
    Traffic,
    num_bytes,
    ring_bytes,
    rows_of,
)

PARALLEL = ("ddp", "fsdp2", "hsdp")
BASELINE = "adamw"
STEP_BYTES = 4  # of one parameter's step counter
# Of intervals without a small common multiple no more steps than these are averaged over.
_MOST_STEPS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """How ranks train one model together.

    Attributes:
        ranks: number of all of them.
        parallel: ``ddp``, ``fsdp2`` or ``hsdp``.
        replicas: groups that hold the same rows, in ``hsdp``.
        positions: tokens that a rank sees in a step; only methods that look inside the layers ask.
        device: kind of the ranks' devices, as torch calls it: stacks are smaller on CPUs.

    Raises:
        ValueError: for numbers that do not fit each other.
    """

    ranks: int
    parallel: str = "ddp"
    replicas: int = 1
    positions: int = 4096
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel = {self.parallel!r} must be one of {', '.join(PARALLEL)}")
        if self.ranks < 1 or self.replicas < 1 or self.ranks % self.replicas:
            raise ValueError(f"{self.ranks} ranks do not make {self.replicas} replicas")
        if (self.parallel == "hsdp") != (self.replicas > 1):
            raise ValueError("replicas are for hsdp, which needs at least two")

    @property
    def size(self) -> int:
        """Ranks that share rows or work."""
        return self.ranks // self.replicas

    def home(self, param: Tensor) -> Home:
        """How a parameter lies over these ranks."""
        if self.parallel == "ddp" or self.ranks == 1:
            return Home()
        return Home(ranges=tuple(chunk_ranges(param.shape[0], self.size)), whole=False)


@dataclass(slots=True, kw_only=True)
class Plan:
    """What one optimizer costs each rank.

    Attributes:
        state_bytes: of every rank, step counters included.
        operations: of every rank, in a mean step.
        fullest: the rank with the most state; the first of these.
        peak_bytes: of what that rank's step allocates beside state, weights and gradients.
        traffic: what that rank's optimizer sends in a mean step.
    """

    name: str
    state_bytes: list[int]
    operations: list[Operations]
    fullest: int
    peak_bytes: int
    traffic: Traffic = field(default_factory=dict)


def plan_optimizer(model: nn.Module, name: str, options: Mapping[str, Any], mesh: Mesh) -> Plan:
    """Plans one of our optimizers for a model on the meta device.

    Raises:
        ValueError: unknown name or option, or a value out of range.
    """
    optimizer = build_optimizer(model, name, lr=1e-3, weight_decay=0.1, **options)
    optimizer.detach()
    shared = SharedWork(optimizer, mesh)
    state_bytes = shared.state_bytes()
    fullest = state_bytes.index(max(state_bytes))
    peak_bytes, traffic = rehearse(shared.planned_rank(fullest))
    return Plan(
        name=name,
        state_bytes=state_bytes,
        operations=shared.operations(),
        fullest=fullest,
        peak_bytes=peak_bytes,
        traffic=traffic,
    )


def plan_adamw(model: nn.Module, mesh: Mesh) -> Plan:
    """Plans torch's fused AdamW, whose state has the dtype of the weights and which sends nothing
    of its own."""
    params = list(model.parameters())
    homes = [mesh.home(param) for param in params]
    sizes = [
        [
            torch.Size(rows_of(param, home, rank)).numel()
            for param, home in zip(params, homes, strict=True)
        ]
        for rank in range(mesh.size)
    ]
    itemsize = params[0].element_size()
    state_bytes = [2 * itemsize * sum(of_rank) + STEP_BYTES * len(params) for of_rank in sizes]
    each = _adamw_operations()
    operations = [Operations(elementwise=each * sum(of_rank)) for of_rank in sizes]
    fullest = state_bytes.index(max(state_bytes))
    return Plan(
        name=BASELINE,
        state_bytes=state_bytes,
        operations=operations,
        fullest=fullest,
        peak_bytes=0,
    )


def passes_traffic(model: nn.Module, mesh: Mesh) -> Traffic:
    """What DDP or FSDP2 sends in forward and backward, of whichever optimizer.

    FSDP2: all weights gathered for each of the passes, gradients reduced and scattered. Rows are
    padded to equal numbers on all ranks, as FSDP2 pads them.
    """
    params = list(model.parameters())
    traffic: Traffic = {}

    def send(purpose: str, kind: str, handed: int, size: int) -> None:
        if size > 1:
            traffic[purpose, kind] = Sent(1, handed, ring_bytes(kind, handed, size))

    if mesh.parallel == "ddp":
        send("gradients", "all_reduce", num_bytes(params), mesh.size)
        return traffic
    shard = sum(
        -(-param.shape[0] // mesh.size) * param[0].numel() * param.element_size()
        for param in params
    )
    send("weights", "all_gather", 2 * shard, mesh.size)
    send("gradients", "reduce_scatter", mesh.size * shard, mesh.size)
    send("gradients", "all_reduce", shard, mesh.replicas)
    return traffic


# -- who works on what --


def on_device(recipe: Recipe, device: str) -> Recipe:
    """The recipe with the stacks it has on a kind of device, for weights that are on none."""
    limit = recipe.numerics.stack_limit_on(device)
    return replace(recipe, numerics=replace(recipe.numerics, bucket_size=limit))


class SharedWork:
    """The plan of work of all ranks of a mesh.

    Where every rank works on the rows it has, parameters of equal shape and views have equal
    shares: those of one of them stand for all, because a thousand ranks times a thousand
    parameters would take long.

    Args:
        optimizer: of whole parameters.
    """

    def __init__(self, optimizer: PreconditionedOptimizer, mesh: Mesh) -> None:
        self._optimizer, self._mesh = optimizer, mesh
        self._recipe = on_device(optimizer.recipe, mesh.device)
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        self._homes = [mesh.home(param) for param in self._params]
        placed = optimizer.placed()
        self._pieces = pieces_of(
            placed, self._params, max_elements=self._recipe.numerics.stack_limit(self._params)
        )
        self._of_param: dict[int, list[PlannedView]] = defaultdict(list)
        for piece in self._pieces:
            for index in piece.params:
                self._of_param[index].append(piece)
        self._scope = Scope(
            stages=self._recipe.stages,
            owners=owner_counts(placed, self._params),
            like=torch.empty((), dtype=self._recipe.numerics.dtype, device=META),
        )
        self._members = self._alike()
        self._work = self._plan([self._of_param[i] for i in self._members])
        self._is_whole = any(self._work.routes[index] != HERE for index in self._members)
        if self._is_whole:
            self._members = {index: [index] for index in range(len(self._params))}
            self._work = self._plan([self._pieces])

    def _alike(self) -> dict[int, list[int]]:
        """Parameters of equal shape and views, by the first of them."""
        first: dict[Any, int] = {}
        found: dict[int, list[int]] = defaultdict(list)
        for index, param in enumerate(self._params):
            views = tuple((piece.key, piece.view) for piece in self._of_param[index])
            found[first.setdefault((param.shape, views), index)].append(index)
        return found

    def _plan(self, pieces: Sequence[Sequence[PlannedView]]) -> Work:
        return plan_work(
            *([piece for some in pieces for piece in some], self._params, self._homes),
            self._recipe.algorithm,
            mode=self._recipe.sharding.sharding,
            size=self._mesh.size,
        )

    def _per_rank(self, of_group: Callable[[Key, int, int], Any]) -> list[dict[Any, int]]:
        """How many groups of each kind every rank has."""
        found: list[dict[Any, int]] = [defaultdict(int) for _ in range(self._mesh.size)]
        for share in self._work.shares:
            groups, blocks, size = share.view.view.shape
            key = of_group(share.view.key._replace(chunk=0), blocks, size)
            ranks = range(self._mesh.size) if share.rank is None else [share.rank]
            for rank in ranks:
                found[rank][key] += groups * len(self._members[share.view.param])
        return found

    def state_bytes(self) -> list[int]:
        """Bytes of state of every rank, step counters included."""

        @cache
        def of_group(key: Key, blocks: int, size: int) -> int:
            state = init_stack(self._recipe, key, (1, blocks, size), META)
            return num_bytes(list(state.values()))

        steps = STEP_BYTES * len(self._params)
        return [
            steps + sum(each * groups for each, groups in counts.items())
            for counts in self._per_rank(of_group)
        ]

    def operations(self) -> list[Operations]:
        """Operations of a mean step of every rank."""
        counts = self._per_rank(lambda *kind: kind)
        kinds = {kind for of_rank in counts for kind in of_rank}
        each = {kind: self._group_operations(*kind) for kind in kinds}
        found = []
        for of_rank in counts:
            total = Operations()
            for kind, groups in of_rank.items():
                total.add(each[kind], groups)
            found.append(total)
        return found

    def planned_rank(self, rank: int) -> PlannedOptimizer:
        """One rank, ready to step."""
        place = Place(
            rank=rank,
            size=self._mesh.size,
            replicas=self._mesh.replicas,
            homes=self._homes,
            work=self.work_of(rank),
            positions=self._mesh.positions,
        )
        return PlannedOptimizer(self._optimizer.param_groups, self._recipe, place)

    def work_of(self, rank: int) -> Work:
        """The plan with all shares of one rank; of others those that it must know of."""
        if self._is_whole:
            return self._work
        shares: list[Share] = []
        known: set[int] = set()
        for share in self._work.shares:
            # Of every piece the first share: there may be kinds that this rank has nothing of.
            if share.rank in (None, rank) or share.view.piece not in known:
                known.add(share.view.piece)
                shares += [self._moved(share, member) for member in self._members[share.view.param]]
        shares.sort(key=lambda share: share.view.piece)
        return Work(
            routes=(HERE,) * len(self._params),
            owners={},
            shares=tuple(shares),
            **self._sums(),
        )

    def _moved(self, share: Share, member: int) -> Share:
        """The same share of a parameter that is alike."""
        own = self._twin(share.view, member)
        view = replace(own, view=share.view.view, extent=share.view.extent)
        return Share(view=view, rank=share.rank)

    def _twin(self, piece: PlannedView, member: int) -> PlannedView:
        """The piece of a member in the place of the piece of the first."""
        number = [other.piece for other in self._of_param[piece.param]].index(piece.piece)
        return self._of_param[member][number]

    def _sums(self) -> dict[str, Any]:
        """Sums, leaders and places of all pieces, from those of the first of each kind."""
        leaders = {
            self._twin(piece, member).piece: self._work.leaders[piece.piece]
            for first, members in self._members.items()
            for piece in self._of_param[first]
            if piece.piece in self._work.sums
            for member in members
        }
        sums: dict[int, tuple[SumKind, int]] = {}
        places: dict[SumKind, int] = defaultdict(int)
        for piece in self._pieces:
            if piece.piece in leaders:
                groups, kind = piece.view.shape[0], sum_kind(piece)
                sums[piece.piece] = kind, places[kind]
                places[kind] += groups
        return {"sums": sums, "leaders": leaders, "places": dict(places)}

    # -- operations --

    def _group_operations(self, key: Key, blocks: int, size: int) -> Operations:
        """Operations of one group's mean step: gradient, statistics, direction, weight."""
        dtype, device = self._params[0].dtype, META
        piece = PlannedView(param=0, view=rows((blocks, size)), key=key._replace(device=device))
        (bucket,) = plan_buckets([piece], max_elements=1)
        state = init_stack(self._recipe, key, bucket.shape, device)
        bank = Bank(bucket, state, [0.0], dtype=self._recipe.numerics.dtype)
        weight, gradient = (torch.empty(blocks, size, dtype=dtype, device=device) for _ in range(2))
        steps = window(self._recipe)
        with DryRun() as dry:
            for step in steps:
                cohorts = list(
                    split_into_cohorts(
                        bank,
                        *algorithm_of(self._recipe, key),
                        {0: gradient},
                        [step - 1],
                        self._recipe.numerics.dtype,
                        columns_of=self._columns(blocks, size, step) if key.role == MAIN else None,
                    )
                )
                torch._foreach_norm([gradient])
                run(
                    cohorts,
                    _update,
                    scope=self._scope,
                    rates={0: 1e-3},
                    health=Health(),
                )
                weight.mul_(0.9)
                for cohort in cohorts:
                    cohort.slots[0].add_from_blocks({0: weight}, cohort.direction, [-1e-3])
        return dry.operations.per(len(steps))

    def _columns(self, blocks: int, size: int, step: int) -> Any:
        needs = layer_needs(self._recipe.algorithm)
        if needs is None or not captures_at(self._recipe.algorithm, step):
            return None
        count = self._mesh.positions * self._mesh.ranks
        count = count if needs.max_columns is None else min(count, needs.max_columns)
        dtype = self._recipe.numerics.dtype
        inputs, outputs = (
            torch.empty(1, count, 1, length, dtype=dtype, device=META) for length in (size, blocks)
        )
        return lambda slot, gradients: Columns(inputs=inputs, outputs=outputs)


def _update(cohorts: Sequence[Cohort]) -> None:
    for cohort in cohorts:
        update_alone(cohort, Updates())


# -- one rank's steps --


def rehearse(optimizer: PlannedOptimizer) -> tuple[int, Traffic]:
    """Runs a rank through all that its intervals have in turn.

    Returns:
        most bytes of temporaries of a step, and what is sent in a mean step.
    """
    steps = window(optimizer.recipe)
    optimizer.begin_at(steps[0])
    peak = 0
    for _ in steps:
        with DryRun() as dry:
            optimizer.step()
        peak = max(peak, dry.peak)
    count = len(steps)
    mean = {
        key: Sent(sent.calls / count, sent.handed / count, sent.wire / count)
        for key, sent in optimizer.traffic.items()
    }
    return peak, mean


def window(recipe: Any) -> range:
    """Steps in which everything that is done at intervals has come its number of times; late enough
    for what only the first steps do."""
    intervals = [
        value
        for item in fields(recipe.algorithm)
        if item.name.endswith("_interval")
        and isinstance(value := getattr(recipe.algorithm, item.name), int)
    ]
    period = min(lcm(*intervals), _MOST_STEPS)
    begin = 1 + period * (2 + recipe.stages.start_step // period)
    return range(begin, begin + period)


@cache
def _adamw_operations() -> float:
    """Elementwise operations of AdamW on one weight."""
    count = 1000
    param = nn.Parameter(torch.zeros(count))
    param.grad = torch.zeros(count)
    optimizer = torch.optim.AdamW([param], foreach=False)
    optimizer.step()
    with DryRun() as dry:
        optimizer.step()
    return round(dry.operations.elementwise / count)
