"""The optimizer shell: the only ``step`` of the project.

One step: gradients -> views as stacked blocks in the state dtype -> statistics when due ->
direction -> graft -> first moment -> decoupled weight decay -> weight. Parameters of equal block
shape, over all layers and heads, go through each of these in one batched call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.linalg.fused import fusing
from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.optim import adaptive_rank
from hf_precond.optim.adaptive_rank import ViewRanks
from hf_precond.optim.capture import Capture
from hf_precond.optim.cluster_step import ClusterStep
from hf_precond.optim.comm import Comm
from hf_precond.optim.faults import Faults
from hf_precond.optim.global_state import StateTensor, state_tensors
from hf_precond.optim.gradients import ready_gradients
from hf_precond.optim.health import Health
from hf_precond.optim.inventory import PlanRow, plan_rows, state_layout
from hf_precond.optim.laid_out import LaidOut, lay_out
from hf_precond.optim.layer_columns import ColumnSource
from hf_precond.optim.layout import (
    PlacedView,
    buckets_of,
    group_names,
    log_displaced,
    pieces_of,
    placed_views,
    take_views,
)
from hf_precond.optim.options import Recipe
from hf_precond.optim.ranks import Ranks, share_work
from hf_precond.optim.roles import algorithm_of, init_stack
from hf_precond.optim.saved_state import STATE_VERSION, check_foreign
from hf_precond.optim.sharding import comm_of, local
from hf_precond.views.plan import Bucket, PlannedView


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
            take_views(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget_banks()
        self._capture.is_stale = True

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
        with self._health.timed(self._laid.device), highest_matmul_precision(), compiles:
            self._ensure_state()
            laid = self._laid
            grads = [local(param.grad) for param in laid.params if param.grad is not None]
            loss_scale = self._capture.loss_scale(self, grads)
            if loss_scale is None:
                return loss
            self._capture.collect(laid.main, laid.steps, loss_scale)
            gradients = self._ready_gradients()
            sharding = laid.ranks.sharding
            work = gradients if sharding is None else sharding.bring(gradients)
            cluster_step = self._cluster_step()
            for cluster in laid.clusters:
                cluster_step.run(cluster, gradients, work)
            for index in gradients:
                laid.steps[index] += 1
                self.state[laid.params[index]]["step"] += 1
            if self.recipe.adapts_rank:
                self._rechoose_ranks()
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
        if self._laid.ranks.global_state is not None:
            packed["state"] = {i: {"step": entry["step"]} for i, entry in packed["state"].items()}
            for index, key, value in self._laid.ranks.global_state.whole(
                self._laid.banks, as_dtensors=True
            ):
                packed["state"][index][key] = value
        return packed

    @property
    def shares_state(self) -> bool:
        """Whether this process has but a part of the state; known from the first step on."""
        return self._laid.ranks.global_state is not None

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes what all ranks have in common."""
        comm = self.comm or comm_of(self._all_params(), self._process_group)
        return comm is None or comm.is_first

    def lay_out(self, view_ranks: ViewRanks | None = None) -> None:
        """Allocates the state, as the first step would. Where there are ranks, all call it.

        Args:
            view_ranks: under ``rank="auto"``, to begin with these; state of other ranks is dropped.
        """
        if view_ranks is not None and view_ranks != self.view_ranks:
            adaptive_rank.write(self.param_groups, view_ranks)
            self.state.clear()
            self._forget_banks()
        self._ensure_state()

    @property
    def comm(self) -> Comm | None:
        """The ranks that train the same weights; None before :meth:`lay_out`, or for one."""
        return self._laid.ranks.comm

    def state_tensors(self) -> list[StateTensor]:
        """Returns what state there is of whole parameters, wherever it lies."""
        params = self._all_params()
        max_elements = self.recipe.numerics.stack_limit(params)
        pieces = pieces_of(self.placed(), params, max_elements=max_elements)
        init = partial(init_stack, self.recipe)
        return [tensor for piece in pieces for tensor in state_tensors(piece, init)]

    def whole_state(self, *, first_rank_only: bool = False) -> Iterator[tuple[int, str, Tensor]]:
        """Yields (parameter index, key, tensor) of all state, as a single process would have it.

        Where several ranks share the state, all of them walk through it.

        Args:
            first_rank_only: for the first rank; the others get nothing.
        """
        params, ranks = self._all_params(), self._laid.ranks
        if ranks.global_state is None:
            for index, param in enumerate(params):
                for key, value in self.state.get(param, {}).items():
                    yield index, key, value
            return
        assert ranks.comm is not None
        if not first_rank_only or ranks.comm.is_first:
            for index, param in enumerate(params):
                yield index, "step", self.state[param]["step"]
        for index, key, found in ranks.global_state.whole(
            self._laid.banks, first_rank_only=first_rank_only
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
        check_foreign(state_dict, self.param_groups, self.recipe.name)
        if state_dict["state"]:
            saved = state_dict["param_groups"]
            ranks = adaptive_rank.read(saved) if "view_ranks" in saved[0] else None
            adaptive_rank.check(ranks, self.param_groups, self.param_names, self.recipe)
        own = [{key: group[key] for key in ("views", "layers")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(saved_ids, self._all_params(), strict=True):
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
        return plan_rows(self.recipe, self._plan_buckets())

    def state_layout(
        self, view_ranks: ViewRanks | None = None
    ) -> Iterator[tuple[int, str, Tensor]]:
        """Returns (parameter index, state key, meta tensor) of all state a first step will make.

        Where several ranks share the state, that of all of them together.

        Args:
            view_ranks: under ``rank="auto"`` in place of the ranks chosen so far.
        """
        return state_layout(self.recipe, len(self._all_params()), self._plan_buckets(view_ranks))

    @property
    def view_ranks(self) -> ViewRanks | None:
        """Under ``rank="auto"`` the rank of each view of each parameter; None elsewhere."""
        if not self.recipe.adapts_rank:
            return None
        adaptive_rank.fill_in(self.param_groups, self.recipe)
        return adaptive_rank.read(self.param_groups)

    def health(self) -> dict[str, float]:
        """Returns cheap figures since the last call: what the algorithm reports (a mean over
        groups), ``graft_ratio`` (graft partner's norm over the direction's), ``skipped_nonfinite``,
        ``failed_updates``, ``step_ms``; ``mean_rank`` where ranks are chosen."""
        for bank in self._laid.banks:
            report = getattr(algorithm_of(self.recipe, bank.bucket.key)[0], "health", None)
            if report is not None:
                for name, values in report(bank.rows(bank.bucket.slots).state).items():
                    self._health.observe(name, values)
        figures = self._health.take()
        if self.view_ranks is not None:
            figures["mean_rank"] = adaptive_rank.mean_rank(self.view_ranks)
        return figures

    # -- state --

    def _reset_caches(self) -> None:
        self._laid = LaidOut()
        self._num_reported = 0
        self._health = Health()
        # Torch loads a state dict through __setstate__, too: what is attached stays attached.
        self._capture: Capture = getattr(self, "_capture", None) or Capture(self.recipe)

    def _forget_banks(self) -> None:
        """The next step lays the state out anew, from what ``state`` holds then."""
        self._laid = self._laid.forgotten()

    def _make_state_whole(self) -> None:
        """Before parameters change: ranks that share the state may share another way afterwards."""
        if not self.shares_state:
            return
        params = self._all_params()
        whole: list[dict[str, Tensor]] = [{} for _ in params]
        for index, key, value in self.whole_state():
            whole[index][key] = value
        self.state.update(zip(params, whole, strict=True))

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def placed(self, view_ranks: ViewRanks | None = None) -> list[PlacedView]:
        """Returns all views of all parameters and where the algorithm wants them.

        Args:
            view_ranks: under ``rank="auto"`` in place of the ranks chosen so far.
        """
        groups = self.param_groups
        if view_ranks is not None:
            groups = [dict(group) for group in groups]
            adaptive_rank.write(groups, view_ranks)
        elif self.recipe.adapts_rank:
            adaptive_rank.fill_in(groups, self.recipe)
        return placed_views(groups, self.recipe.algorithm)

    def _plan_buckets(self, view_ranks: ViewRanks | None = None) -> list[Bucket]:
        """The stacks of a single process."""
        params = self._all_params()
        max_elements = self.recipe.numerics.stack_limit(params)
        return buckets_of(self.placed(view_ranks), params, max_elements=max_elements)

    def _ensure_state(self) -> None:
        """Lays the banks out, taking over what ``state`` holds after a load or a copy."""
        if self._laid.is_complete:
            return
        names, placed = self.param_names, self.placed()
        self._faults = Faults(names, self.recipe.numerics.max_failures, self._health)
        # Once for each parameter.
        new = placed[self._num_reported :]
        log_displaced(new, names, self.recipe.name, self.recipe.fallback.fallback)
        self._num_reported = len(placed)
        self._laid = lay_out(
            *(self.param_groups, names, self.state, placed, self.recipe), self._share_work
        )

    def _share_work(self, params: Sequence[Tensor], pieces: Sequence[PlannedView]) -> Ranks:
        """Plans what this rank works on, where there are several."""
        return share_work(params, self.param_names, pieces, self.recipe, self._process_group)

    # -- one step --

    def _ready_gradients(self) -> dict[int, Tensor]:
        """Gradients of the parameters that take part: they are there and finite."""
        return ready_gradients(self._laid, self.recipe, self._capture, self._faults)

    def _cluster_step(self) -> ClusterStep:
        return ClusterStep(
            recipe=self.recipe,
            laid=self._laid,
            param_groups=self.param_groups,
            capture=self._capture,
            faults=self._faults,
            health=self._health,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _rechoose_ranks(self) -> None:
        """Gives the views other ranks, where that is due and the state asks for it."""
        done = max(self._laid.steps, default=0)
        due = done > 0 and done % self.recipe.ranks.rank_interval == 0
        if due and adaptive_rank.rechoose(
            self._laid, self.param_groups, self.placed(), self.recipe, self.state
        ):
            self._forget_banks()
            self._ensure_state()

    def _arm(self) -> None:
        """Prepares the capture of the next step."""
        self._capture.arm(self._laid.steps or [0] * len(self._all_params()))
