"""One rank of a mesh that does not exist: the optimizer's own step on meta tensors.

The step is the code's own. What stands in for the other ranks is a :class:`Ledger`, which takes
what is handed to collectives and writes down how much it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim.comm import Comm
from hf_precond.optim.gradients import clip_gradients, gradient_norms
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.optim.options import Recipe
from hf_precond.optim.ranks import Ranks
from hf_precond.optim.sharding import Sharding
from hf_precond.optim.together import Together
from hf_precond.optim.weights import Weights
from hf_precond.optim.work import EXCHANGED, GATHERED, HERE, Home, Work
from hf_precond.preconditioners.base import Columns, layer_needs
from hf_precond.views.plan import PlannedView, Slot

META = torch.device("meta")
_GROUP_KEYS = ("params", "param_names", "views", "layers", "view_ranks", "weight_decay")
# What an optimizer sends, by what it is for.
PURPOSES = ("gradients", "directions", "small sums", "norms", "control", "results", "columns")


@dataclass(slots=True)
class Sent:
    """What one rank hands to the collectives of one kind and purpose.

    Attributes:
        calls: how often.
        handed: bytes this rank puts in.
        wire: bytes that leave it under a ring algorithm.
    """

    calls: float = 0
    handed: float = 0
    wire: float = 0


Traffic = dict[tuple[str, str], Sent]
"""(purpose, kind of collective) -> what was sent."""


def ring_bytes(kind: str, handed: float, size: int) -> float:
    """Bytes that one of ``size`` ranks sends in a ring, of ``handed`` that it puts in.

    >>> ring_bytes("all_reduce", 100, 4), ring_bytes("all_gather", 100, 4)
    (150.0, 300)
    """
    if kind == "all_gather":
        return handed * (size - 1)
    others = (size - 1) / size
    return handed * {"all_reduce": 2 * others, "broadcast": 1.0}.get(kind, others)


class Ledger(Comm):
    """The ranks of a group as seen by one of them, of which the others do not exist.

    Args:
        traffic: where everything is written down.
        labels: purpose of what is sent by a method of this object.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        traffic: Traffic,
        replicas: Ledger | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.rank, self.size, self.replicas = rank, size, replicas
        self.traffic, self._labels = traffic, labels or {}

    def labelled(self, **labels: str) -> Ledger:
        """The same ranks, where the methods named serve the purposes given."""
        assert self.replicas is None or isinstance(self.replicas, Ledger)
        return Ledger(self.rank, self.size, self.traffic, self.replicas, labels)

    def record(self, purpose: str, kind: str, handed: int) -> None:
        """Writes one call down."""
        entry = self.traffic.setdefault((purpose, kind), Sent())
        entry.calls += 1
        entry.handed += handed
        entry.wire += ring_bytes(kind, handed, self.size)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this rank adds."""
        if sum(tensor.numel() for tensor in tensors):
            self.record(self._labels.get("sum", "norms"), "all_reduce", num_bytes(tensors))
        return [tensor.clone() for tensor in tensors]

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """See :meth:`sum`; only the control of a step takes this way."""
        (total,) = self.labelled(sum="control").sum([tensor])
        return total if self.replicas is None else self.replicas.sum_everywhere(total)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """What is there already."""
        if tensors:
            self.record(
                "results", "broadcast", num_bytes([torch.cat([t.flatten() for t in tensors])])
            )

    def all_gather(self, flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Tensors of all ranks, padded on the way as the optimizer's are."""
        padded = flat.new_zeros(max(sizes))
        out = flat.new_empty(self.size * padded.numel())
        if out.numel():
            purpose = self._labels.get("all_gather", "directions")
            self.record(purpose, "all_gather", num_bytes([padded]))
        return [part[:size] for part, size in zip(out.chunk(self.size), sizes, strict=True)]

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> list[Tensor]:
        """What comes from every rank."""
        purpose = self._labels.get("all_to_all", "gradients")
        self.record(purpose, "all_to_all", num_bytes([flat]))
        return list(flat.new_empty(sum(receive)).split(list(receive)))


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PlannedSharding(Sharding):
    """Carries out a plan of work where parameters are cut by nothing but their ``homes``."""

    def __init__(self, *args: Any, homes: Sequence[Home], **options: Any) -> None:
        super().__init__(*args, **options)
        self.homes = list(homes)
        assert isinstance(self.comm, Ledger)
        self._ledger = self.comm

    def bring(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """See :class:`Sharding`; the whole of a gradient that is cut comes by an all-gather."""
        routes = self.work.routes
        found = {
            index: self._whole(index, grad) if routes[index] == EXCHANGED else grad
            for index, grad in gradients.items()
            if routes[index] in (HERE, EXCHANGED)
        }
        return found | self._gather(gradients)

    def targets(self, weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """See :class:`Sharding`."""
        found = {}
        for index, weight in weights.items():
            if self._is_staged(index) or self.work.owners.get(index) == self.comm.rank:
                found[index] = weight.new_zeros(self._params[index].shape, dtype=self._dtype)
            elif self.work.routes[index] != GATHERED:
                found[index] = weight
        return found

    def delivered(self, targets: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Sharding`."""
        for index, staged in targets.items():
            if self._is_staged(index):
                yield index, staged[slice(*self.homes[index].ranges[self.comm.rank])].clone()
        yield from self._scatter(targets).items()

    def _is_staged(self, index: int) -> bool:
        return self.work.routes[index] == EXCHANGED and bool(self.homes[index].ranges)

    def _whole(self, index: int, grad: Tensor) -> Tensor:
        if not self.homes[index].ranges:
            return grad
        sizes = [self._numel(index, rank) for rank in range(self.comm.size)]
        ledger = self._ledger.labelled(all_gather="gradients")
        return torch.cat(ledger.all_gather(grad.flatten(), sizes)).view(self._params[index].shape)

    def _scatter(self, targets: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The way back of :class:`Sharding`, to rows of which there is no DTensor to ask."""
        moving = self._active_gathered
        if not moving:
            return {}
        by_rank, own = self._by_owner(moving), self.comm.rank
        mine = by_rank[own]
        flat = torch.cat(
            [torch.empty(0, dtype=self._dtype, device=META), *(targets[i].flatten() for i in mine)]
        )
        send = [sum(self._numel(i, rank) for i in mine) for rank in range(self.comm.size)]
        receive = [sum(self._numel(i, own) for i in of_rank) for of_rank in by_rank]
        ledger = self._ledger.labelled(all_to_all="directions")
        back = ledger.all_to_all(flat.to(self._exchange_dtype), send, receive)
        found = {}
        for of_rank, part in zip(by_rank, back, strict=True):
            sizes = [self._numel(i, own) for i in of_rank]
            for index, delta in zip(of_rank, part.split(sizes), strict=True):
                shape = rows_of(self._params[index], self.homes[index], own)
                found[index] = delta.to(self._dtype).view(shape)
        return found


def rows_of(param: Tensor, home: Home, rank: int) -> tuple[int, ...]:
    """Shape of what a rank has of a parameter."""
    if not home.ranges:
        return tuple(param.shape)
    start, stop = home.ranges[rank]
    return (stop - start, *param.shape[1:])


class PlannedColumns:
    """Columns of no numbers, as many as all ranks together capture.

    Args:
        positions: that each rank sees of a batch.
        world: number of all ranks.
        layers: indices of the parameters whose layers are captured.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        recipe: Recipe,
        ledger: Ledger | None,
        *,
        positions: int,
        world: int,
        layers: Sequence[int],
    ) -> None:
        needs = layer_needs(recipe.algorithm)
        assert needs is not None
        limit = needs.max_columns
        self._here = positions if limit is None else min(positions, max(1, limit // world))
        self._sizes = {i: (params[i][0].numel(), params[i].shape[0]) for i in layers}
        self._dtype, self._ledger, self._world = recipe.numerics.dtype, ledger, world
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def arm(self, steps: Mapping[int, int]) -> None:
        """Nothing to prepare."""
        self._seen = {}

    def clear(self) -> None:
        """Drops what was captured."""
        self._seen = {}

    def collect(self, loss_scale: float | Tensor) -> None:
        """Brings together what all ranks have captured: every layer's columns on every rank."""
        count = self._here * sum(sum(sizes) + 1 for sizes in self._sizes.values())
        if self._ledger is not None:
            self._ledger.record("columns", "all_gather", 5 * 8 * len(self._sizes))
            own = torch.empty(count, dtype=self._dtype, device=META)
            self._ledger.record("columns", "all_gather", num_bytes([own]))
            # Alive while it is taken apart.
            _payloads = own.new_empty(self._world, count)
        self._seen = {index: self._empty(*sizes) for index, sizes in self._sizes.items()}

    def columns(self, slot: Slot, gradients: Mapping[int, Tensor]) -> Columns | None:
        """Columns of a slot's layer."""
        inputs, outputs = self._seen[slot.param]
        groups, rows, width = slot.view.shape
        if (groups, rows, width) != (1, outputs.shape[-1], inputs.shape[-1]):
            inputs = inputs.new_empty(groups, len(inputs), width)
            outputs = outputs.new_empty(groups, len(outputs), rows)
        inputs, outputs = (x.view(groups, -1, 1, x.shape[-1]) for x in (inputs, outputs))
        return Columns(inputs=inputs, outputs=outputs)

    def _empty(self, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        count = self._here * self._world
        made = (
            torch.empty(count, size, dtype=self._dtype, device=META) for size in (inputs, outputs)
        )
        return tuple(made)  # type: ignore[return-value]


class _NothingSaved:
    """In place of the state of all ranks: a plan begins without any."""

    def localized(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What was saved: nothing."""
        return [dict(entry) for entry in saved]


class _OwnWeights(Weights):
    """A rank's parts of parameters, apart from these; in no dtype but their own."""

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._own = weights

    def taken(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """The parts of some parameters."""
        return {index: self._own[index] for index in indices}

    def round_back(self, weights: Mapping[int, Tensor], steps: Sequence[int]) -> None:
        """Nothing to round."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank of a mesh and what it shares.

    Attributes:
        rank: among those that share rows or work.
        size: number of these.
        replicas: number of groups that do the same (HSDP).
        homes: how each parameter lies over the ranks.
        work: who works on what; with all shares of this rank and, where directions go around, of
            all ranks. None for a single process.
        positions: that a rank sees of a batch.
    """

    rank: int
    size: int
    replicas: int = 1
    homes: Sequence[Home]
    work: Work | None
    positions: int = 4096


class PlannedOptimizer(PreconditionedOptimizer):
    """An optimizer of whole parameters on the meta device that steps as one rank of a mesh.

    Args:
        param_groups: of another optimizer of these parameters, with names, views and layers.
    """

    def __init__(
        self, param_groups: Sequence[Mapping[str, Any]], recipe: Recipe, place: Place
    ) -> None:
        self.place = place
        self.traffic: Traffic = {}
        groups = [
            {key: group[key] for key in _GROUP_KEYS if key in group} for group in param_groups
        ]
        super().__init__(groups, recipe)
        self._ensure_state()
        params = self._laid.params
        homes = zip(params, place.homes, strict=True)
        shapes = [rows_of(param, home, place.rank) for param, home in homes]
        dtypes = [param.dtype for param in params]
        weights = _OwnWeights(dict(enumerate(map(_empty, shapes, dtypes))))
        self._laid = replace(self._laid, weights=weights)
        self._own_gradients = dict(enumerate(map(_empty, shapes, dtypes)))
        self._feed_columns()

    def state_bytes(self) -> int:
        """Bytes of all state of this rank, step counters included."""
        own = [tensor for bank in self._laid.banks for tensor in bank.tensors.values()]
        return num_bytes([*own, *(entry["step"] for entry in self.state.values())])

    def begin_at(self, step: int) -> None:
        """The next step will be number ``step`` of all parameters."""
        self._laid.steps[:] = [step - 1] * len(self._laid.params)

    def _feed_columns(self) -> None:
        if not self._capture.is_needed:
            return
        layers = [layout for group in self.param_groups for layout in group["layers"]]
        self.feed(
            PlannedColumns(
                self._laid.params,
                self.recipe,
                self.comm if isinstance(self.comm, Ledger) else None,
                positions=self.place.positions,
                world=self.place.size * self.place.replicas,
                layers=[index for index, layout in enumerate(layers) if layout],
            )
        )

    # -- what other ranks have their part in --

    def _share_work(self, params: Sequence[Tensor], pieces: Sequence[PlannedView]) -> Ranks:
        place = self.place
        if place.work is None or place.size * place.replicas == 1:
            return Ranks()
        replicas = Ledger(0, place.replicas, self.traffic) if place.replicas > 1 else None
        ledger = Ledger(place.rank, place.size, self.traffic, replicas)
        dtype, options = self.recipe.numerics.dtype, self.recipe.sharding
        together = Together(
            ledger.labelled(sum="small sums"),
            self.recipe.algorithm,
            num_params=len(params),
            work=place.work if place.work.is_shared else None,
            dtype=dtype,
            device=META,
        )
        if not place.work.is_shared and all(home.whole for home in place.homes):
            return Ranks(comm=ledger, together=together)
        exchange_dtype = getattr(torch, options.exchange_dtype) if options.exchange_dtype else dtype
        sharding = PlannedSharding(
            *(params, place.work, ledger),
            homes=place.homes,
            dtype=dtype,
            exchange_dtype=exchange_dtype,
        )
        nothing: Any = _NothingSaved()
        return Ranks(comm=ledger, together=together, sharding=sharding, global_state=nothing)

    def _rechoose_ranks(self) -> None:
        """Nothing is known of any spectrum: the ranks to begin with stay."""

    # -- what this rank has of the parameters --

    def _ready_gradients(self) -> dict[int, Tensor]:
        laid, gradients = self._laid, dict(self._own_gradients)
        if laid.ranks.sharding is None:
            norms = gradient_norms(gradients, {}, self.recipe, laid.device)
        else:
            norms, _ = laid.ranks.sharding.norms(gradients)
        clip_gradients(gradients, norms, {}, self.recipe, self._capture)
        return gradients


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=META)
