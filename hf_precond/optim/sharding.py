"""Gradients to the ranks that work on them, and their directions back.

What goes where is planned in :mod:`hf_precond.optim.work`; here it is carried out, each kind of
exchange in one collective for all parameters together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.norms import norms
from hf_precond.optim.comm import Comm, world_group
from hf_precond.optim.work import EXCHANGED, GATHERED, HERE, Home, Share, Work
from hf_precond.views.plan import Slot
from hf_precond.views.shards import chunk_ranges


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; without importing that module, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; shares its memory."""
    found: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return found


def comm_of(params: Sequence[Tensor], group: Any = None) -> Comm | None:
    """Returns the ranks that share the work on parameters; None where there is but one.

    Row shards of FSDP2 decide: their ranks (in a two-dimensional mesh those along its sharded
    dimension) have different rows. Else the given process group, or all processes.
    """
    for param in params:
        dim = _row_dim(param)
        if dim is not None:
            mesh = param.device_mesh  # type: ignore[attr-defined]
            others = [world_group(mesh.get_group(d)) for d in range(mesh.ndim) if d != dim]
            replicas = [Comm(other) for other in others if other is not None]
            return Comm(mesh.get_group(dim), replicas[0] if len(replicas) == 1 else None)
    if any(map(is_dtensor, params)):
        return Comm(group or torch.distributed.distributed_c10d._get_default_group())
    found = world_group(group)
    return None if found is None else Comm(found)


def home_of(param: Tensor, comm: Comm) -> Home:
    """How a parameter lies over the ranks."""
    if not is_dtensor(param):
        return Home()
    dim = _row_dim(param)
    if dim is None or set(_ranks(param, dim)) != set(_group_ranks(comm)):
        return Home(whole=False)
    return Home(ranges=tuple(chunk_ranges(param.shape[0], comm.size)), whole=False)


def _row_dim(param: Tensor) -> int | None:
    """The mesh dimension along which a parameter's rows, and nothing else of it, are cut."""
    if not is_dtensor(param):
        return None
    placements = param.placements  # type: ignore[attr-defined]
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    # By name: a strided shard is a subclass whose rows are interleaved.
    if len(cut) != 1 or type(placements[cut[0]]).__name__ != "Shard" or placements[cut[0]].dim:
        return None
    return cut[0]


def _ranks(param: Tensor, dim: int) -> list[int]:
    return torch.distributed.get_process_group_ranks(param.device_mesh.get_group(dim))  # type: ignore[attr-defined]


def _group_ranks(comm: Comm) -> list[int]:
    return torch.distributed.get_process_group_ranks(comm.group)


class Sharding:
    """Carries out a plan of work.

    Args:
        params: all parameters.
        dtype: of directions.
        exchange_dtype: in which directions go over the wire.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        work: Work,
        comm: Comm,
        *,
        dtype: torch.dtype,
        exchange_dtype: torch.dtype,
    ) -> None:
        self.work, self.comm = work, comm
        self.shares = work.of_rank(comm.rank)
        self._params = params
        self.homes = [home_of(param, comm) for param in params]
        self._dtype, self._exchange_dtype = dtype, exchange_dtype
        self._by_piece = self._exchanged_shares()
        self._sent = {share_key(share) for share in self._by_piece}

    def is_exchanged(self, slot: Slot) -> bool:
        """Whether a slot's direction goes to all ranks."""
        return slot_key(slot) in self._sent

    # -- gradients --

    def norms(self, gradients: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], set[int]]:
        """Returns the norms of whole gradients, in float64, and which ones not all ranks have."""
        count, size = len(self._params), self.comm.size
        device = local(self._params[0]).device
        figures = torch.zeros(2, count, dtype=torch.float64, device=device)
        if gradients:
            index = torch.tensor(list(gradients), device=device)
            here = norms([local(gradient) for gradient in gradients.values()])
            squares = torch.stack([norm.double() for norm in here]).square()
            # What all ranks have counts once.
            parts = [1.0 if self.homes[i].ranges else 1.0 / size for i in gradients]
            weights = torch.tensor(parts, dtype=torch.float64, device=device)
            figures[0, index] = squares * weights
            figures[1, index] = 1.0
        (figures,) = self.comm.sum([figures])
        present = figures[1].tolist()
        uneven = {i for i, ranks in enumerate(present) if 0 < ranks < size}
        return {i: figures[0, i].sqrt() for i in gradients}, uneven

    def bring(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Returns the gradients that this rank works on, as its views expect them."""
        found = {}
        for index, grad in gradients.items():
            route = self.work.routes[index]
            if route == HERE:
                found[index] = local(grad)
            elif route == EXCHANGED:
                found[index] = grad.full_tensor() if is_dtensor(grad) else grad  # type: ignore[attr-defined]
        return found | self._gather({i: local(g) for i, g in gradients.items()})

    # -- directions --

    def targets(self, weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Where this rank's directions are written: its parts of weights, or zeros to be sent
        from."""
        found = {}
        for index, weight in weights.items():
            param, route = self._params[index], self.work.routes[index]
            staged = route == EXCHANGED and is_dtensor(param)
            if staged or self.work.owners.get(index) == self.comm.rank:
                device = local(param).device
                found[index] = torch.zeros(param.shape, dtype=self._dtype, device=device)
            elif route != GATHERED:
                found[index] = weight
        return found

    def exchange(
        self, directions: Mapping[tuple[int, str], Tensor], active: Mapping[int, Tensor]
    ) -> Iterator[tuple[Share, Tensor]]:
        """Yields every exchanged share with its direction, of all ranks.

        Args:
            directions: of this rank's shares by :func:`share_key`.
            active: the parameters that take part in this step.
        """
        wanted = [share for share in self._by_piece if _takes_part(share, active)]
        if not self._by_piece:
            return
        sizes = [0] * self.comm.size
        for share in wanted:
            assert share.rank is not None
            sizes[share.rank] += share.view.view.numel
        if not sum(sizes):
            return
        own = [directions[share_key(share)] for share in wanted if share.rank == self.comm.rank]
        device = local(self._params[0]).device
        flat = torch.empty(0, dtype=self._exchange_dtype, device=device)
        if own:
            flat = torch.cat([part.reshape(-1).to(self._exchange_dtype) for part in own])
        parts = self.comm.all_gather(flat, sizes)
        done = [0] * self.comm.size
        for share in wanted:
            assert share.rank is not None
            start = done[share.rank]
            done[share.rank] = stop = start + share.view.view.numel
            blocks = parts[share.rank][start:stop].to(self._dtype)
            yield share, blocks.view(share.view.view.shape)

    def delivered(self, targets: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yields (parameter, what to add to this rank's part of it) of staged directions."""
        for index, staged in targets.items():
            param = self._params[index]
            if self.work.routes[index] == EXCHANGED and is_dtensor(param):
                yield index, _placed_like(param, staged)
        yield from self._scatter(targets).items()

    # -- gathered parameters --

    def _gather(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """All rows of each gathered parameter's gradient to its owner."""
        moving = self._moving(gradients)
        if not moving:
            return {}
        dtype = gradients[moving[0]].dtype
        if any(gradients[index].dtype != dtype for index in moving):
            dtype = self._dtype
        by_rank = self._by_owner(moving)
        mine = by_rank[self.comm.rank]
        parts = [gradients[i].reshape(-1).to(dtype) for of_rank in by_rank for i in of_rank]
        send = [sum(gradients[i].numel() for i in of_rank) for of_rank in by_rank]
        receive = [sum(self._numel(i, rank) for i in mine) for rank in range(self.comm.size)]
        pieces: dict[int, list[Tensor]] = {index: [] for index in mine}
        for rank, flat in enumerate(self.comm.all_to_all(torch.cat(parts), send, receive)):
            for index, part in zip(
                mine, flat.split([self._numel(i, rank) for i in mine]), strict=True
            ):
                pieces[index].append(part)
        return {i: torch.cat(found).view(self._params[i].shape) for i, found in pieces.items()}

    def _scatter(self, targets: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The rows of staged directions to the ranks that have them."""
        moving = self._active_gathered
        if not moving:
            return {}
        by_rank, ranks = self._by_owner(moving), range(self.comm.size)
        mine = by_rank[self.comm.rank]
        parts = [
            targets[i][slice(*self.homes[i].ranges[rank])].reshape(-1)
            for rank in ranks
            for i in mine
        ]
        device = local(self._params[0]).device
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=self._dtype, device=device)
        send = [sum(self._numel(i, rank) for i in mine) for rank in ranks]
        own = self.comm.rank
        receive = [sum(self._numel(i, own) for i in of_rank) for of_rank in by_rank]
        back = self.comm.all_to_all(flat.to(self._exchange_dtype), send, receive)
        found = {}
        for of_rank, part in zip(by_rank, back, strict=True):
            for index, delta in zip(
                of_rank, part.split([self._numel(i, own) for i in of_rank]), strict=True
            ):
                shape = local(self._params[index]).shape
                found[index] = delta.to(self._dtype).view(shape)
        return found

    def _moving(self, gradients: Mapping[int, Tensor]) -> list[int]:
        """The gathered parameters of this step, remembered for the way back."""
        self._active_gathered = [
            index for index in gradients if self.work.routes[index] == GATHERED
        ]
        return self._active_gathered

    def _by_owner(self, indices: Sequence[int]) -> list[list[int]]:
        owners = self.work.owners
        return [[i for i in indices if owners[i] == rank] for rank in range(self.comm.size)]

    def _numel(self, index: int, rank: int) -> int:
        """Elements of a parameter's rows on a rank."""
        start, stop = self.homes[index].ranges[rank]
        shape = self._params[index].shape
        return (stop - start) * (shape.numel() // shape[0] if shape[0] else 0)

    def _exchanged_shares(self) -> list[Share]:
        routes = self.work.routes
        return [
            share
            for share in self.work.shares
            if routes[share.view.param] == EXCHANGED and share.rank is not None
        ]


def share_key(share: Share) -> tuple[int, str]:
    """Names a share of this rank."""
    return share.view.piece, str(share.view.extent)


def slot_key(slot: Slot) -> tuple[int, str]:
    """The same of the slot that a share became."""
    return slot.piece, str(slot.extent)


def _takes_part(share: Share, active: Mapping[int, Tensor]) -> bool:
    view = share.view
    return view.param in active and (view.bias is None or view.bias in active)


def _placed_like(param: Tensor, full: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, as a parameter is cut."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    placed = distribute_tensor(full, mesh, placements, src_data_rank=None)
    return local(placed)
