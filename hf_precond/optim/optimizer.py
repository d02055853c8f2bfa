"""The optimizer shell: the only ``step`` of the project.

One step: gradients -> views as stacked blocks in the state dtype -> statistics when due -> direction ->
graft -> first moment -> decoupled weight decay -> weight. Parameters of equal block shape, over all layers
and heads, go through each of these in one batched call.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.optim.banks import Bank, BankRows
from hf_precond.optim.health import Health
from hf_precond.optim.options import Recipe
from hf_precond.optim.stages import (
    NO_STAGES,
    NORM_EPS,
    StageOptions,
    graft_step,
    graft_update_,
    momentum_,
)
from hf_precond.preconditioners.base import Preconditioner, State, StepContext
from hf_precond.views.plan import Bucket, PlannedView, Slot, clusters, plan_buckets
from hf_precond.views.view import ParamView, check_cover, flat, rows

logger = logging.getLogger(__name__)

STATE_VERSION = 1
_MAIN, _FALLBACK = "main", "fallback"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """How many parameters and state bytes one algorithm has."""

    algorithm: str
    num_tensors: int
    num_params: int
    state_bytes: int


@dataclass(slots=True, kw_only=True)
class _Work:
    """One cohort of a bucket in flight: slots whose parameters are at the same step."""

    slots: Sequence[Slot]
    algorithm: Preconditioner
    stages: StageOptions
    rows: BankRows
    ctx: StepContext
    gradient: Tensor  # [G, M, B]
    direction: Tensor  # [G, M, B]: the moment first, then the direction
    graft_sq: Tensor | None = None  # squares of the graft partner's step, [G]

    @property
    def state(self) -> dict[str, Tensor]:
        """The stacked state of the cohort."""
        return self.rows.state

    @property
    def is_fallback(self) -> bool:
        """Whether these parameters follow the fallback algorithm."""
        return self.stages is NO_STAGES

    def part(self, slot: Slot, start: int, stop: int) -> _Work:
        """The work of one slot: groups ``start:stop`` of this stack."""
        state = {name: tensor[start:stop] for name, tensor in self.state.items()}
        return replace(
            self,
            slots=[slot],
            rows=BankRows(self.rows.bank, [slot], state, None),
            ctx=StepContext(step=self.ctx.step),
            gradient=self.gradient[start:stop],
            direction=self.direction[start:stop],
        )


class PreconditionedOptimizer(torch.optim.Optimizer):
    """Any algorithm of the registry as a ``torch.optim.Optimizer``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or param groups. A group may carry ``"views"``:
            index-aligned with its parameters, a list of :meth:`ParamView.to_plain` each, empty for the
            fallback algorithm. Without it, views follow from shapes: matrices are ``[O, I]``.
        recipe: what to compute, from :func:`hf_precond.registry.resolve`.
        lr: learning rate.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: for a negative or non-finite ``lr`` or ``weight_decay``, duplicate parameters or views
            that do not belong to them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Recipe,
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= float(value) < float("inf"):
                raise ValueError(f"{name} = {value!r} is not allowed: it must be >= 0 and finite")
        self.recipe = recipe
        self._reset_caches()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "algorithm": recipe.name,
            "state_version": STATE_VERSION,
        }
        super().__init__(params, defaults)

    # -- torch.optim.Optimizer ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; without ``"views"`` its parameters get views from their shapes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        views = group.setdefault("views", [_default_views(param) for param in group["params"]])
        if len(views) != len(group["params"]):
            raise ValueError(
                f"a param group has {len(group['params'])} parameters and {len(views)} views: "
                "give one list of views per parameter"
            )
        for name, param, plain in zip(_group_names(group), group["params"], views, strict=True):
            _check_views(name, param, plain)
        self._banks = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            FloatingPointError: if a parameter's gradient was not finite ``max_failures`` times in a row.
            DecompositionError: if a parameter's factorisation failed that often.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._health.timed(self._device), highest_matmul_precision():
            self._ensure_state()
            ready = self._ready_params()
            for cluster in self._clusters:
                self._step_cluster(cluster, frozenset(ready))
            for index in ready:
                self._steps[index] += 1
                self.state[self._params[index]]["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, keeping dtypes and this optimizer's own views.

        Torch casts every state tensor to its parameter's dtype; statistics in float32 beside bf16 weights
        would lose most of their bits. The saved tensors are taken again as they are.

        Raises:
            ValueError: if the state belongs to another algorithm, version, or other views.
        """
        self._check_foreign(state_dict)
        views = [group["views"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, views, strict=True):
            group["views"] = own
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_ids, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][index])
        self._banks = None
        if self.state:
            self._ensure_state()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "recipe": self.recipe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()

    # -- what users and the Trainer may ask -----------------------------------------------------------

    @property
    def algorithm_name(self) -> str:
        """The registry name."""
        return self.recipe.name

    @property
    def param_names(self) -> list[str]:
        """Names of all parameters in group order; ``param_<i>`` where none were given."""
        names = [name for group in self.param_groups for name in _group_names(group)]
        return [name or f"param_{index}" for index, name in enumerate(names)]

    def plan(self) -> list[PlanRow]:
        """Returns parameters and state bytes per algorithm, without allocating anything."""
        names = {_MAIN: self.recipe.name, _FALLBACK: self.recipe.fallback.fallback}
        tensors: Counter[str] = Counter()
        params: Counter[str] = Counter()
        state_bytes: Counter[str] = Counter()
        for bucket in self._plan_buckets():
            name = names[bucket.key[0]]
            tensors[name] += len(bucket.params)
            params[name] += sum(slot.view.numel for slot in bucket.slots)
            for meta in self._init_bucket(bucket, torch.device("meta")).values():
                state_bytes[name] += meta.numel() * meta.element_size()
        return [
            PlanRow(
                algorithm=name,
                num_tensors=tensors[name],
                num_params=params[name],
                state_bytes=state_bytes[name],
            )
            for name in tensors
        ]

    def state_layout(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yields (parameter index, state key, meta tensor) of all state a first step will make."""
        index = 0
        for group in self.param_groups:
            for _ in group["params"]:
                yield index, "step", torch.empty((), device="meta")
                index += 1
        for bucket in self._plan_buckets():
            bank = Bank(bucket, self._init_bucket(bucket, torch.device("meta")))
            for slot, key, piece in bank.slices():
                yield slot.param, key, piece

    def health(self) -> dict[str, float]:
        """Returns cheap figures since the last call: what the algorithm reports (a mean over groups),
        ``graft_ratio`` (graft partner's norm over the direction's), ``skipped_nonfinite``,
        ``failed_updates``, ``step_ms``."""
        for bank in self._banks or ():
            report = getattr(self._algorithm(bank.bucket)[0], "health", None)
            if report is not None:
                for name, values in report(bank.tensors).items():
                    self._health.observe(name, values)
        return self._health.take()

    # -- state ----------------------------------------------------------------------------------------

    def _reset_caches(self) -> None:
        self._banks: list[Bank] | None = None
        self._clusters: list[list[Bank]] = []
        self._params: list[Tensor] = []
        self._group_of: list[int] = []
        self._steps: list[int] = []
        self._streaks: dict[tuple[str, int], int] = {}
        self._health = Health()

    @property
    def _device(self) -> torch.device:
        return self._params[0].device if self._params else torch.device("cpu")

    def _algorithm(self, bucket: Bucket) -> tuple[Preconditioner, StageOptions]:
        if bucket.key[0] == _MAIN:
            return self.recipe.algorithm, self.recipe.stages
        return self.recipe.fallback_algorithm, NO_STAGES

    def _init_bucket(self, bucket: Bucket, device: torch.device) -> State:
        """Allocates the state of a bucket: the algorithm's and its stages'."""
        algorithm, stages = self._algorithm(bucket)
        dtype = self.recipe.numerics.dtype
        return {
            **algorithm.init(bucket.shape, dtype=dtype, device=device),
            **stages.init(bucket.shape, dtype=dtype, device=device),
        }

    def _plan_buckets(self) -> list[Bucket]:
        planned, index = [], 0
        for group in self.param_groups:
            for param, plain in zip(group["params"], group["views"], strict=True):
                kind = _MAIN if plain else _FALLBACK
                views = [ParamView.from_plain(view) for view in plain] or [flat(param.shape)]
                planned += [
                    PlannedView(param=index, view=view, key=(kind, param.device)) for view in views
                ]
                index += 1
        return plan_buckets(planned, max_elements=self.recipe.numerics.bucket_size)

    def _ensure_state(self) -> None:
        """Allocates the banks, or rebuilds them from ``state`` after a load, a copy or a new group."""
        if self._banks is not None:
            return
        self._params = [param for group in self.param_groups for param in group["params"]]
        self._group_of = [
            number for number, group in enumerate(self.param_groups) for _ in group["params"]
        ]
        saved = [self.state[param] if param in self.state else {} for param in self._params]
        banks = []
        for bucket in self._plan_buckets():
            bank = Bank(bucket, self._init_bucket(bucket, bucket.key[1]))
            bank.adopt(saved)
            banks.append(bank)
        self._steps = []
        for param, old in zip(self._params, saved, strict=True):
            step = torch.as_tensor(old.get("step", 0.0), dtype=torch.float32).cpu().clone()
            # A bf16 counter would stop at 256: the counter is float32 whatever the weights are.
            self.state[param] = {"step": step}
            self._steps.append(int(step))
        for bank in banks:
            for slot, key, piece in bank.slices():
                self.state[self._params[slot.param]][key] = piece
        by_bucket = {id(bank.bucket): bank for bank in banks}
        self._banks = banks
        self._clusters = [
            [by_bucket[id(bucket)] for bucket in members]
            for members in clusters([bank.bucket for bank in banks])
        ]

    def _check_foreign(self, state_dict: dict[str, Any]) -> None:
        """Refuses a state dict that another optimizer, version or grouping wrote."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            name, version = saved.get("algorithm"), saved.get("state_version")
            if name != self.recipe.name:
                raise ValueError(
                    f"the state dict was written by optimizer {name or 'of another package'!r}, "
                    f"this one is {self.recipe.name!r}"
                )
            if version != STATE_VERSION:
                raise ValueError(
                    f"the state dict has state_version {version!r}, this package reads {STATE_VERSION}"
                )
            if state_dict["state"] and saved.get("views") != own["views"]:
                raise ValueError(
                    "the state dict was written with other views of the parameters: check "
                    "attention_grouping, the view rules and the order of the parameters"
                )

    # -- one step -------------------------------------------------------------------------------------

    def _ready_params(self) -> list[int]:
        """Indices of parameters that take part: a gradient is there and is finite."""
        present = [index for index, param in enumerate(self._params) if param.grad is not None]
        for index in present:
            if self._params[index].grad.is_sparse:  # type: ignore[union-attr]
                raise ValueError(
                    f"{self.param_names[index]!r} has a sparse gradient: use nn.Embedding(sparse=False)"
                )
        if not present or not self.recipe.numerics.skip_nonfinite:
            return present
        norms = torch._foreach_norm([self._params[index].grad for index in present])
        finite = torch.isfinite(torch.stack([norm.float().to(self._device) for norm in norms]))
        good = present
        if not bool(finite.all()):
            flags = dict(zip(present, finite.tolist(), strict=True))
            good = [index for index in present if flags[index]]
            bad = [index for index in present if not flags[index]]
            what = "gradient is not finite, step left out"
            self._count_failures(bad, "skipped_nonfinite", what, FloatingPointError)
        self._clear_failures(good, "skipped_nonfinite")
        return good

    def _count_failures(
        self, indices: Iterable[int], figure: str, what: str, error: type[ArithmeticError]
    ) -> None:
        names, limit = self.param_names, self.recipe.numerics.max_failures
        for index in indices:
            self._health.count(figure)
            streak = self._streaks[figure, index] = self._streaks.get((figure, index), 0) + 1
            logger.warning("%s: %s (%d in a row)", names[index], what, streak)
            if streak >= limit:
                raise error(f"{names[index]!r}: {what}, {streak} in a row (max_failures = {limit})")

    def _clear_failures(self, indices: Iterable[int], figure: str) -> None:
        if self._streaks:
            for index in indices:
                self._streaks.pop((figure, index), None)

    def _step_cluster(self, cluster: Sequence[Bank], ready: frozenset[int]) -> None:
        """Runs all buckets that share parameters, from their gradients to their weights."""
        work = [item for bank in cluster for item in self._cohorts(bank, ready)]
        self._precondition(work)
        self._graft(work)
        for item in work:
            if item.stages.momentum_site == "direction":
                item.direction = momentum_(item.stages, item.state, item.direction, item.ctx.step)
            item.rows.commit()
        self._write(work)

    def _cohorts(self, bank: Bank, ready: frozenset[int]) -> Iterator[_Work]:
        """Splits the ready slots of a bucket by step count; as a rule all are at the same step."""
        algorithm, stages = self._algorithm(bank.bucket)
        by_step: dict[int, list[Slot]] = defaultdict(list)
        for slot in bank.bucket.slots:
            if slot.param in ready:
                by_step[self._steps[slot.param] + 1].append(slot)
        for step, slots in by_step.items():
            rows = bank.rows(slots)
            gradient = self._gather(slots)
            moment = gradient
            if stages.momentum_site == "gradient":
                moment = momentum_(stages, rows.state, gradient, step)
            yield _Work(
                slots=slots,
                algorithm=algorithm,
                stages=stages,
                rows=rows,
                ctx=StepContext(step=step),
                gradient=gradient,
                direction=moment,
            )

    def _gather(self, slots: Sequence[Slot]) -> Tensor:
        """Stacks gradients as ``[G, M, B]`` in the state dtype; may alias a single gradient."""
        dtype = self.recipe.numerics.dtype
        blocks = []
        for slot in slots:
            grad = self._params[slot.param].grad
            assert grad is not None, "only parameters with a gradient are ready"
            blocks.append(slot.view.to_blocks(grad))
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).to(dtype)

    def _precondition(self, work: Sequence[_Work]) -> None:
        """Takes gradients into the statistics and replaces each moment by its direction."""
        normalized = any(item.stages.graft_normalizes for item in work)
        gradient_norms = self._norms(work, [w.gradient for w in work]) if normalized else None
        moment_norms = gradient_norms
        if normalized and any(item.direction is not item.gradient for item in work):
            moment_norms = self._norms(work, [w.direction for w in work])
        for number, item in enumerate(work):
            self._update(item)
            moment, step = item.direction, item.ctx.step
            partner = None
            if item.stages.graft != "none":
                ones = item.gradient.new_ones(())
                norm = gradient_norms[number] if gradient_norms else ones
                graft_update_(item.stages, item.state, item.gradient, norm)
                norm = moment_norms[number] if moment_norms else ones
                partner = graft_step(item.stages, item.state, moment, norm, step)
            if step < item.stages.start_step:
                item.direction = moment if partner is None else partner
                continue
            item.direction = item.algorithm.apply(item.state, moment, item.ctx)
            if partner is not None:
                item.graft_sq = _group_squares(partner)

    def _update(self, item: _Work) -> None:
        """Updates statistics; a failed factorisation leaves only its own parameters' as they were."""
        params = {slot.param for slot in item.slots}
        try:
            item.algorithm.update(item.state, item.gradient, item.ctx)
        except DecompositionError as error:
            if len(item.slots) == 1:
                self._count_failures(params, "failed_updates", str(error), DecompositionError)
                return
            start = 0
            for slot in item.slots:
                stop = start + slot.stop - slot.start
                self._update(item.part(slot, start, stop))
                start = stop
            return
        if item.ctx.refreshed:
            self._clear_failures(params, "failed_updates")

    def _graft(self, work: Sequence[_Work]) -> None:
        """Gives each direction the norm of its graft partner's step."""
        grafted = [item for item in work if item.graft_sq is not None]
        if not grafted:
            return
        partner = self._norms(grafted, [item.graft_sq for item in grafted])  # type: ignore[misc]
        own = self._norms(grafted, [item.direction for item in grafted])
        for item, wanted, norm in zip(grafted, partner, own, strict=True):
            ratio = wanted / (norm + NORM_EPS)
            item.direction = item.direction * ratio
            self._health.observe("graft_ratio", ratio)

    def _norms(self, work: Sequence[_Work], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Norms over whole parameters (or views, or groups), broadcastable ``[G, 1, 1]`` per item.

        Takes ``[G, M, B]`` tensors, or their squares summed per group ``[G]``.
        """
        scope = work[0].stages.graft_scope
        squares = [x if x.ndim == 1 else _group_squares(x) for x in tensors]
        if scope == "parameter":
            total = squares[0].new_zeros(len(self._params))
            for item, square in zip(work, squares, strict=True):
                total.index_add_(0, item.rows.owner(scope), square)
            squares = [total[item.rows.owner(scope)] for item in work]
        elif scope == "view":
            owners = [item.rows.owner(scope) for item in work]
            squares = [
                torch.zeros_like(square).index_add_(0, owner, square)[owner]
                for owner, square in zip(owners, squares, strict=True)
            ]
        return [square.sqrt()[:, None, None] for square in squares]

    def _write(self, work: Sequence[_Work]) -> None:
        """Decays and moves the weights."""
        decayed: set[int] = set()
        for item in work:
            start = 0
            for slot in item.slots:
                stop = start + slot.stop - slot.start
                param, group = self._params[slot.param], self.param_groups[self._group_of[slot.param]]
                lr = group["lr"]
                if slot.param not in decayed:
                    decayed.add(slot.param)
                    if group["weight_decay"] != 0:
                        param.mul_(1 - lr * group["weight_decay"])
                if item.is_fallback:
                    lr = lr * self.recipe.fallback.fallback_lr_ratio
                slot.view.add_from_blocks(param, item.direction[start:stop], -lr)
                start = stop


def _group_squares(x_GMB: Tensor) -> Tensor:
    """Sum of squares of each group, ``[G]``."""
    return torch.linalg.vector_norm(x_GMB, dim=(-2, -1)).square()


def _group_names(group: dict[str, Any]) -> list[str]:
    return list(group.get("param_names", [""] * len(group["params"])))


def _default_views(param: Tensor) -> list[list[Any]]:
    """Views from the shape alone: matrices and kernels by rows, the rest to the fallback."""
    return [rows(param.shape).to_plain()] if param.ndim >= 2 else []


def _check_views(name: str, param: Tensor, plain: Sequence[Any]) -> None:
    """Raises ValueError unless the plain views cover the parameter exactly once."""
    if not plain:
        return
    try:
        check_cover([ParamView.from_plain(view) for view in plain], param.shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error
