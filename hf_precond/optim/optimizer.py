"""The optimizer shell: the only ``step`` of the project.

One step: gradients -> views as stacked blocks in the state dtype -> statistics when due ->
direction -> graft -> first moment -> decoupled weight decay -> weight. Parameters of equal block
shape, over all layers and heads, go through each of these in one batched call.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.linalg.fused import fusing
from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.linalg.rounding import HALF_DTYPES, round_stochastically
from hf_precond.optim.banks import Bank
from hf_precond.optim.capture import Capture, LayerInputError
from hf_precond.optim.comm import Comm
from hf_precond.optim.faults import Faults
from hf_precond.optim.flat_parameters import check_not_flat
from hf_precond.optim.global_state import GlobalState, StateTensor, state_tensors
from hf_precond.optim.health import Health
from hf_precond.optim.layer_columns import ColumnSource
from hf_precond.optim.layout import (
    PlacedView,
    buckets_of,
    displaced,
    group_names,
    owner_counts,
    phases_by_piece,
    pieces_of,
    placed_views,
)
from hf_precond.optim.options import Recipe
from hf_precond.optim.pipeline import (
    Cohort,
    Scope,
    Updates,
    run,
    split_into_cohorts,
    update_alone,
)
from hf_precond.optim.sharding import Sharding, comm_of, home_of, local, slot_key
from hf_precond.optim.stages import NO_STAGES, StageOptions
from hf_precond.optim.together import Together
from hf_precond.optim.work import plan_work
from hf_precond.preconditioners.base import (
    FALLBACK,
    GRAFT,
    MAIN,
    Preconditioner,
    Shape,
    State,
    StepContext,
    exact_state,
)
from hf_precond.preconditioners.diagonal import Identity
from hf_precond.views.plan import (
    Bucket,
    PlannedView,
    Slot,
    add_from_blocks,
    clusters,
    plan_buckets,
)
from hf_precond.views.view import ParamView, check_cover, rows

logger = logging.getLogger(__name__)

STATE_VERSION = 1
# A start step for what is left to the graft partner.
_NEVER = 2**62
_META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """How many parameters and state bytes one algorithm has."""

    algorithm: str
    num_tensors: int
    num_params: int
    state_bytes: int


class PreconditionedOptimizer(torch.optim.Optimizer):
    """Any algorithm of the registry as a ``torch.optim.Optimizer``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or param groups. A group may carry
            ``"views"``: index-aligned with its parameters, a list of :meth:`ParamView.to_plain`
            each, empty for the fallback algorithm. Without it, views follow from shapes: matrices
            are ``[O, I]``. And ``"layers"``: :meth:`WeightLayout.to_plain` each, empty for a
            parameter whose layer's inputs are not known; :meth:`attach` writes it.
        recipe: what to compute, from :func:`hf_precond.registry.resolve`.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        process_group: ranks that train the same weights; by default all of them. FSDP2's row shards
            know theirs.

    Raises:
        ValueError: for a negative or non-finite ``lr`` or ``weight_decay``, duplicate parameters or
            views that do not belong to them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Recipe,
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        process_group: Any = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= float(value) < float("inf"):
                raise ValueError(f"{name} = {value!r} is not allowed: it must be >= 0 and finite")
        self.recipe = recipe
        self._process_group = process_group
        self.steps_per_epoch = recipe.schedules.steps_per_epoch
        self._reset_caches()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "algorithm": recipe.name,
            "state_version": STATE_VERSION,
        }
        super().__init__(params, defaults)

    # -- torch.optim.Optimizer --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; without ``"views"`` its parameters get views from their shapes."""
        self._make_state_whole()
        super().add_param_group(param_group)
        try:
            self._take_views(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget_banks()
        self._capture.is_stale = True

    @staticmethod
    def _take_views(group: dict[str, Any]) -> None:
        """Gives a group its views, by the shapes where it brings none, and checks them."""
        for param in group["params"]:
            check_not_flat(param)
        views = group.setdefault("views", [_default_views(param) for param in group["params"]])
        layers = group.setdefault("layers", [[] for _ in group["params"]])
        for key, entries in (("views", views), ("layers", layers)):
            if len(entries) != len(group["params"]):
                raise ValueError(
                    f"a param group has {len(group['params'])} parameters and {len(entries)} "
                    f"{key}: give one list of {key} per parameter"
                )
        for name, param, plain in zip(group_names(group), group["params"], views, strict=True):
            _check_views(name, param, plain)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step. Where several ranks share the work, all of them take part.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            FloatingPointError: if a parameter's gradient was not finite ``max_failures`` times in a
            row.
            DecompositionError: if a parameter's factorisation failed that often.
            LayerInputError: if the algorithm needs its layers' inputs and none are captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiles = fusing(self.recipe.numerics.compile)
        with self._health.timed(self._device), highest_matmul_precision(), compiles:
            self._ensure_state()
            grads = [local(param.grad) for param in self._params if param.grad is not None]
            loss_scale = self._capture.loss_scale(self, grads)
            if loss_scale is None:
                return loss
            self._capture.collect(self._main, self._steps, loss_scale)
            gradients = self._ready_gradients()
            work = gradients if self._sharding is None else self._sharding.bring(gradients)
            for cluster in self._clusters:
                self._step_cluster(cluster, gradients, work)
            for index in gradients:
                self._steps[index] += 1
                self.state[self._params[index]]["step"] += 1
            self._arm()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients, and forgets what layers have seen on the way to them."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def attach(self, model: nn.Module) -> None:
        """Captures what the layers of a model see from now on, for algorithms that need it.

        Once per model object: a copy of the model or of the optimizer is attached anew. Where the
        param groups came without layers, they are looked up in the model.

        Raises:
            ValueError: for a parameter that is none of the model's.
        """
        if not self._capture.is_needed:
            return
        self._capture.attach(model, self.param_groups)
        self._forget_banks()
        if self.state:
            self._ensure_state()
        self._arm()

    def detach(self) -> None:
        """Takes the hooks of :meth:`attach` off the model."""
        self._capture.detach()

    def feed(self, source: ColumnSource) -> None:
        """Takes columns from another source than hooks on a model."""
        self.detach()
        self._capture.source = source
        self._arm()

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the loss, where what layers have seen must be unscaled, too.

        The Trainer sets it. A loop of its own needs it only if it calls ``scaler.unscale_``.
        """
        return self._capture.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self._capture.grad_scaler = scaler

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's protocol by which a GradScaler hands its scale over."""
        return self._capture.awaits_loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Returns the state and the param groups, as torch does.

        Where several ranks share the state, all of them call it and each gets whole tensors:
        DTensors where rows are cut as FSDP2 has cut the parameter's, plain ones elsewhere.
        """
        packed = super().state_dict()
        if self._global_state is not None:
            packed["state"] = {i: {"step": entry["step"]} for i, entry in packed["state"].items()}
            for index, key, value in self._global_state.whole(self._banks, as_dtensors=True):
                packed["state"][index][key] = value
        return packed

    @property
    def shares_state(self) -> bool:
        """Whether this process has but a part of the state; known from the first step on."""
        return self._global_state is not None

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes what all ranks have in common."""
        params = [param for group in self.param_groups for param in group["params"]]
        comm = self._comm or comm_of(params, self._process_group)
        return comm is None or comm.is_first

    def lay_out(self) -> None:
        """Allocates the state, as the first step would. Where there are ranks, all call it."""
        self._ensure_state()

    @property
    def comm(self) -> Comm | None:
        """The ranks that train the same weights; None before :meth:`lay_out`, or for one."""
        return self._comm

    def state_tensors(self) -> list[StateTensor]:
        """Returns what state there is of whole parameters, wherever it lies."""
        params = [param for group in self.param_groups for param in group["params"]]
        max_elements = self.recipe.numerics.bucket_size
        pieces = pieces_of(self._placed_views(), params, max_elements=max_elements)
        return [tensor for piece in pieces for tensor in state_tensors(piece, self._init_stack)]

    def whole_state(self, *, first_rank_only: bool = False) -> Iterator[tuple[int, str, Tensor]]:
        """Yields (parameter index, key, tensor) of all state, as a single process would have it.

        Where several ranks share the state, all of them walk through it.

        Args:
            first_rank_only: for the first rank; the others get nothing.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if self._global_state is None:
            for index, param in enumerate(params):
                for key, value in self.state.get(param, {}).items():
                    yield index, key, value
            return
        assert self._comm is not None
        if not first_rank_only or self._comm.is_first:
            for index, param in enumerate(params):
                yield index, "step", self.state[param]["step"]
        for index, key, found in self._global_state.whole(
            self._banks, first_rank_only=first_rank_only
        ):
            if found is not None:
                yield index, key, found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, keeping dtypes and this optimizer's own views.

        A state dict of whole tensors fits every number of ranks and every way to share the work.

        Torch casts every state tensor to its parameter's dtype; statistics in float32 beside bf16
        weights would lose most of their bits. The saved tensors are taken again as they are.

        Raises:
            ValueError: if the state belongs to another algorithm, version, or other views.
        """
        self._check_foreign(state_dict)
        own = [{key: group[key] for key in ("views", "layers")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_ids, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][index])
        self._forget_banks()
        if self.state:
            self._ensure_state()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        own = {"recipe": self.recipe, "steps_per_epoch": self.steps_per_epoch}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._process_group = getattr(self, "_process_group", None)
        self._reset_caches()

    # -- what users and the Trainer may ask --

    @property
    def algorithm_name(self) -> str:
        """The registry name."""
        return self.recipe.name

    @property
    def param_names(self) -> list[str]:
        """Names of all parameters in group order; ``param_<i>`` where none were given."""
        names = [name for group in self.param_groups for name in group_names(group)]
        return [name or f"param_{index}" for index, name in enumerate(names)]

    def plan(self) -> list[PlanRow]:
        """Returns parameters and state bytes per algorithm, without allocating anything."""
        names = {
            MAIN: self.recipe.name,
            GRAFT: f"graft step ({self.recipe.stages.graft})",
            FALLBACK: self.recipe.fallback.fallback,
        }
        tensors: dict[str, set[int]] = defaultdict(set)
        params: Counter[str] = Counter()
        state_bytes: Counter[str] = Counter()
        for bucket in self._plan_buckets():
            name = names[bucket.key[0]]
            tensors[name].update(bucket.params)
            params[name] += sum(slot.view.numel for slot in bucket.slots)
            for meta in self._init_stack(bucket.key[0], bucket.shape, _META).values():
                state_bytes[name] += meta.numel() * meta.element_size()
        return [
            PlanRow(
                algorithm=name,
                num_tensors=len(indices),
                num_params=params[name],
                state_bytes=state_bytes[name],
            )
            for name, indices in tensors.items()
        ]

    def state_layout(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yields (parameter index, state key, meta tensor) of all state a first step will make.

        Where several ranks share the state, that of all of them together.
        """
        index = 0
        for group in self.param_groups:
            for _ in group["params"]:
                yield index, "step", torch.empty((), device="meta")
                index += 1
        for bucket in self._plan_buckets():
            bank = Bank(bucket, self._init_stack(bucket.key[0], bucket.shape, _META))
            for slot, key, piece in bank.slices():
                yield slot.param, key, piece

    def health(self) -> dict[str, float]:
        """Returns cheap figures since the last call: what the algorithm reports (a mean over
        groups), ``graft_ratio`` (graft partner's norm over the direction's), ``skipped_nonfinite``,
        ``failed_updates``, ``step_ms``."""
        for bank in self._banks:
            report = getattr(self._algorithm(bank.bucket.key[0])[0], "health", None)
            if report is not None:
                for name, values in report(bank.rows(bank.bucket.slots).state).items():
                    self._health.observe(name, values)
        return self._health.take()

    # -- state --

    def _reset_caches(self) -> None:
        self._forget_banks()
        self._params: list[Tensor] = []
        self._group_of: list[int] = []
        self._steps: list[int] = []
        self._num_reported = 0
        self._health = Health()
        # Torch loads a state dict through __setstate__, too: what is attached stays attached.
        self._capture: Capture = getattr(self, "_capture", None) or Capture(self.recipe)

    def _forget_banks(self) -> None:
        """The next step lays the state out anew, from what ``state`` holds then."""
        self._banks: list[Bank] = []
        self._clusters: list[list[Bank]] = []
        self._is_laid_out = False
        self._comm: Comm | None = None
        self._sharding: Sharding | None = None
        self._together: Together | None = None
        self._global_state: GlobalState | None = None

    def _make_state_whole(self) -> None:
        """Before parameters change: ranks that share the state may share another way afterwards."""
        if self._global_state is None:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        whole: list[dict[str, Tensor]] = [{} for _ in params]
        for index, key, value in self.whole_state():
            whole[index][key] = value
        self.state.update(zip(params, whole, strict=True))

    @property
    def _largest_norm(self) -> float:
        """Squares of gradients are summed over steps: a margin of 2^20 for that."""
        return float(torch.finfo(self.recipe.numerics.dtype).max ** 0.5 / 2**10)

    @property
    def _device(self) -> torch.device:
        return self._params[0].device if self._params else torch.device("cpu")

    def _algorithm(self, role: str) -> tuple[Preconditioner, StageOptions]:
        if role == MAIN:
            return self.recipe.algorithm, self.recipe.stages
        stages = self.recipe.stages
        if role == GRAFT:
            # Without a partner what is left is the gradient, or its momentum.
            never = stages if stages.graft == "none" else replace(stages, start_step=_NEVER)
            return Identity(), never
        return self.recipe.fallback_algorithm, NO_STAGES

    def _init_stack(self, role: str, shape: Shape, device: torch.device) -> State:
        """Allocates the state of a stack: the algorithm's and its stages'."""
        algorithm, stages = self._algorithm(role)
        dtype, stored = self.recipe.numerics.dtype, self.recipe.numerics.storage_dtype
        state = {
            **algorithm.init(shape, dtype=dtype, device=device),
            **stages.init(shape, dtype=dtype, device=device),
        }
        exact = exact_state(algorithm)
        return {name: x if name in exact else x.to(stored) for name, x in state.items()}

    def _placed_views(self) -> list[PlacedView]:
        return placed_views(self.param_groups, self.recipe.algorithm)

    def _plan_buckets(self) -> list[Bucket]:
        """The stacks of a single process."""
        params = [param for group in self.param_groups for param in group["params"]]
        max_elements = self.recipe.numerics.bucket_size
        return buckets_of(self._placed_views(), params, max_elements=max_elements)

    def _log_displaced(self, placed: Sequence[PlacedView]) -> None:
        """Says once which matrices the algorithm does not take, and why."""
        names = self.param_names
        for place, params in displaced(placed[self._num_reported :]).items():
            what = self.recipe.fallback.fallback if place.role == FALLBACK else "the graft step"
            found = list(dict.fromkeys(names[param] for param in params))
            logger.warning(
                "%s: %d matrices follow %s: %s (%s%s)",
                *(self.recipe.name, len(params), what, place.reason),
                *(", ".join(found[:3]), ", ..." if len(found) > 3 else ""),
            )
        self._num_reported = len(placed)

    def _ensure_state(self) -> None:
        """Lays the banks out, taking over what ``state`` holds after a load or a copy."""
        if self._is_laid_out:
            return
        self._params = [param for group in self.param_groups for param in group["params"]]
        self._faults = Faults(self.param_names, self.recipe.numerics.max_failures, self._health)
        self._group_of = [
            number for number, group in enumerate(self.param_groups) for _ in group["params"]
        ]
        saved: list[dict[str, Any]] = [self.state.get(param, {}) for param in self._params]
        placed = self._placed_views()
        self._log_displaced(placed)
        self._owners = owner_counts(placed, self._params)
        self._main = {item.param for item in placed if item.place.role == MAIN}
        self._joint = {(item.param, item.bias) for item in placed if item.bias is not None}
        max_elements = self.recipe.numerics.bucket_size
        pieces = pieces_of(placed, self._params, max_elements=max_elements)
        buckets = plan_buckets(pieces, max_elements=max_elements)
        phases = phases_by_piece(buckets)
        self._share_work(pieces)
        if self._sharding is not None and self._global_state is not None:
            own = [share.view for share in self._sharding.shares]
            buckets = plan_buckets(own, max_elements=max_elements)
            saved = self._global_state.localized(saved)
        banks: list[Bank] = []
        for bucket in buckets:
            state = self._init_stack(bucket.key[0], bucket.shape, bucket.key[1])
            turns = [phase for slot in bucket.slots for phase in slot.part_of(phases[slot.piece])]
            bank = Bank(bucket, state, turns, dtype=self.recipe.numerics.dtype)
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
        if self.recipe.stages.clip_mode == "kl" or self._sharding is not None:
            # One factor for all layers; or ranks that must ask each other the same, all at once.
            self._clusters = [banks]
        self._is_laid_out = True

    def _share_work(self, pieces: Sequence[PlannedView]) -> None:
        """Plans what this rank works on, where there are several.

        Raises:
            RuntimeError: if the ranks have other parameters or options than each other.
        """
        self._comm = comm_of(self._params, self._process_group)
        if self._comm is None:
            return
        shapes = [tuple(param.shape) for param in self._params]
        alike = (self.param_names, shapes, self.recipe.hyperparameters(), self.recipe.name)
        if any(other != alike for other in self._comm.gather_objects(alike)):
            raise RuntimeError(
                f"{self.recipe.name}: the ranks have other parameters or options than each other; "
                "models that are trained apart need process_group= of their own"
            )
        options = self.recipe.sharding
        homes = [home_of(param, self._comm) for param in self._params]
        work = plan_work(
            *(pieces, self._params, homes, self.recipe.algorithm),
            mode=options.sharding,
            size=self._comm.size,
        )
        dtype = self.recipe.numerics.dtype
        self._together = Together(
            self._comm,
            self.recipe.algorithm,
            num_params=len(self._params),
            work=work if work.is_shared else None,
            dtype=dtype,
            device=self._device,
        )
        if not work.is_shared and all(home.whole for home in homes):
            return
        exchange_dtype = getattr(torch, options.exchange_dtype) if options.exchange_dtype else dtype
        self._sharding = Sharding(
            self._params, work, self._comm, dtype=dtype, exchange_dtype=exchange_dtype
        )
        self._global_state = GlobalState(self._params, pieces, self._sharding, self._init_stack)

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
                    f"the state dict has state_version {version!r}, "
                    f"this package reads {STATE_VERSION}"
                )
            changed = [key for key in ("views", "layers") if saved.get(key) != own[key]]
            if state_dict["state"] and changed:
                raise ValueError(
                    f"the state dict was written with other {changed[0]} of the parameters: check "
                    "attention_grouping, the view rules and the order of the parameters"
                )

    # -- one step --

    def _ready_gradients(self) -> dict[int, Tensor]:
        """Gradients of the parameters that take part: they are there and finite.

        Raises:
            ValueError: for a sparse gradient.
            FloatingPointError: if a parameter's gradient was not finite too often in a row.
        """
        gradients = {
            index: param.grad for index, param in enumerate(self._params) if param.grad is not None
        }
        uneven: set[int] = set()
        for index, grad in gradients.items():
            if grad.is_sparse:
                raise ValueError(
                    f"{self.param_names[index]!r} has a sparse gradient: use nn.Embedding without "
                    "sparse=True"
                )
        alone = self._capture.alone()
        if self._sharding is None:
            norms = self._gradient_norms(gradients, alone)
        else:
            norms, uneven = self._sharding.norms(gradients)
        for index in alone:
            param = self._params[index]
            gradients[index] = param.new_zeros(()).expand(param.shape)
        if uneven:
            gradients = {i: grad for i, grad in gradients.items() if i not in uneven}
            what = "has a gradient on some ranks only, step left out"
            self._faults.count(sorted(uneven), "skipped_nonfinite", what, FloatingPointError)
        if self.recipe.numerics.skip_nonfinite and gradients:
            found = torch.stack([norms[index] for index in gradients])
            good = found <= self._largest_norm  # not a NaN
            if not bool(good.all()):
                flags = zip(list(gradients), good.tolist(), strict=True)
                for index in [index for index, fits in flags if not fits]:
                    del gradients[index]
                    large = isfinite(float(norms[index]))
                    what = "too large to be squared" if large else "not finite"
                    what = f"gradient is {what}, step left out"
                    self._faults.count([index], "skipped_nonfinite", what, FloatingPointError)
            self._faults.clear(gradients, "skipped_nonfinite")
        for weight, bias in self._joint:
            # Trained together or not at all.
            if (weight in gradients) != (bias in gradients):
                gradients.pop(weight, None)
                gradients.pop(bias, None)
                if self._params[weight].grad is None or self._params[bias].grad is None:
                    what = "of the layer's weight and bias one has no gradient, step left out"
                    self._faults.count([weight], "missing_columns", what, LayerInputError)
        self._clip_gradients(gradients, norms, alone)
        return gradients

    def _gradient_norms(
        self, gradients: Mapping[int, Tensor], alone: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """Norm of each gradient in the state dtype, by index; nothing where nobody asks for it."""
        limit = self.recipe.stages.max_grad_norm
        if not (self.recipe.numerics.skip_nonfinite or limit is not None):
            return {}
        found = torch._foreach_norm(list(gradients.values())) if gradients else ()
        norms = dict(zip(gradients, found, strict=True)) | dict(alone)
        dtype = self.recipe.numerics.dtype
        return {index: norm.to(self._device, dtype) for index, norm in norms.items()}

    def _clip_gradients(
        self,
        gradients: Mapping[int, Tensor],
        norms: Mapping[int, Tensor],
        alone: Mapping[int, Tensor],
    ) -> None:
        """Scales the gradients that take part to ``max_grad_norm`` at most, in place."""
        limit = self.recipe.stages.max_grad_norm
        if limit is None or not gradients:
            return
        total = torch.linalg.vector_norm(torch.stack([norms[index] for index in gradients]))
        # The small number is torch's.
        factor = (limit / (total + 1e-6)).clamp(max=1)
        formed = [local(grad) for index, grad in gradients.items() if index not in alone]
        torch._foreach_mul_(formed, factor)
        self._capture.clip(factor)

    def _arm(self) -> None:
        """Prepares the capture of the next step."""
        count = sum(len(group["params"]) for group in self.param_groups)
        self._capture.arm(self._steps or [0] * count)

    def _step_cluster(
        self,
        cluster: Sequence[Bank],
        gradients: Mapping[int, Tensor],
        work: Mapping[int, Tensor],
    ) -> None:
        """Runs all buckets that share parameters, from their gradients to their weights.

        Args:
            gradients: of the parameters that take part.
            work: those that this rank works on, as its views expect them.
        """
        columns_of = self._capture.columns_of(self._steps, self._faults)
        cohorts = [
            cohort
            for bank in cluster
            for cohort in split_into_cohorts(
                bank,
                *self._algorithm(bank.bucket.key[0]),
                work,
                self._steps,
                self.recipe.numerics.dtype,
                self.steps_per_epoch,
                columns_of if bank.bucket.key[0] == MAIN else None,
            )
        ]
        rates = self._rates(cluster, gradients)
        device = cluster[0].bucket.key[1] if cluster else self._device
        scope = Scope(
            stages=self.recipe.stages,
            owners=self._owners,
            like=torch.empty((), dtype=self.recipe.numerics.dtype, device=device),
            comm=self._comm if self._sharding and self._sharding.work.is_shared else None,
        )
        run(
            cohorts, partial(self._update, gradients), scope=scope, rates=rates, health=self._health
        )
        weights = self._working_weights(rates)
        for index, rate in rates.items():
            decay = self.param_groups[self._group_of[index]]["weight_decay"]
            if decay != 0:
                weights[index].mul_(1 - rate * decay)
        if self._sharding is None:
            for cohort in cohorts:
                for slot, groups in cohort.parts():
                    alphas = self._alphas(slot, rates, cohort.factor)
                    slot.add_from_blocks(weights, cohort.direction[groups], alphas)
        else:
            self._add_shared(self._sharding, cohorts, weights, rates)
        self._round_back(weights)

    def _working_weights(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """This rank's parts of parameters; in float32 where they are rounded stochastically."""
        weights = {index: local(self._params[index]) for index in indices}
        if not self.recipe.numerics.stochastic_rounding:
            return weights
        return {
            index: weight.float() if weight.dtype in HALF_DTYPES else weight
            for index, weight in weights.items()
        }

    def _round_back(self, weights: Mapping[int, Tensor]) -> None:
        """Rounds weights that were worked on as copies, once for decay and updates together."""
        for index, weight in weights.items():
            param = local(self._params[index])
            if weight.dtype != param.dtype:
                step = self._steps[index] + 1
                param.copy_(round_stochastically(weight, param.dtype, step))

    def _rates(
        self, cluster: Sequence[Bank], gradients: Mapping[int, Tensor]
    ) -> dict[int, float | Tensor]:
        """Learning rate of each parameter that takes part; of all of them where ranks share."""
        here = {index for bank in cluster for index in bank.bucket.params}
        schedule, scales, rates = self.recipe.schedules.lr_schedule, dict[int, float](), {}
        for index in gradients:
            if index in here or self._sharding is not None:
                step = self._steps[index] + 1
                if step not in scales:
                    ctx = StepContext(step=step, steps_per_epoch=self.steps_per_epoch)
                    scales[step] = ctx.value(schedule)
                rates[index] = scales[step] * self.param_groups[self._group_of[index]]["lr"]
        return rates

    def _alphas(
        self, item: Slot | PlannedView, rates: Mapping[int, float | Tensor], factor: float
    ) -> list[float | Tensor]:
        """What a direction is multiplied with before it is added to its parameters."""
        fallback = item.role == FALLBACK
        ratio = self.recipe.fallback.fallback_lr_ratio if fallback else 1.0
        return [-rates[index] * ratio * factor for index in item.params]

    def _add_shared(
        self,
        sharding: Sharding,
        cohorts: Sequence[Cohort],
        weights: Mapping[int, Tensor],
        rates: Mapping[int, float | Tensor],
    ) -> None:
        """Adds directions to weights, those of other ranks as well."""
        targets = sharding.targets(weights)
        sent: dict[tuple[int, str], Tensor] = {}
        for cohort in cohorts:
            for slot, groups in cohort.parts():
                direction = cohort.direction[groups]
                if sharding.is_exchanged(slot):
                    sent[slot_key(slot)] = direction * cohort.factor
                else:
                    slot.add_from_blocks(
                        targets, direction, self._alphas(slot, rates, cohort.factor)
                    )
        for share, direction in sharding.exchange(sent, weights):
            alphas = self._alphas(share.view, rates, 1.0)
            add_from_blocks(share.view, targets, direction, alphas)
        for index, delta in sharding.delivered(targets):
            weights[index].add_(delta)

    def _update(self, active: Mapping[int, Tensor], cohorts: Sequence[Cohort]) -> None:
        """Takes gradients into the statistics, in step with other ranks where there are some."""
        if self._together is None:
            updates = Updates()
            for cohort in cohorts:
                update_alone(cohort, updates)
        else:
            updates = self._together.update(cohorts, active, self._steps)
        updates.report(self._faults)


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
