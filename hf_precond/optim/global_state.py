"""State that lies on several ranks, as whole tensors and back.

Under sharding a rank has the state of its shares alone. Checkpoints know nothing of that: there a
state tensor is the one that a single process would have. All functions that talk to other ranks
walk the tensors in the same order on each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank, part_key
from hf_precond.optim.sharding import Sharding, is_dtensor, local
from hf_precond.optim.work import Share, is_flat
from hf_precond.preconditioners.base import Shape, State
from hf_precond.views.plan import Extent, Key, PlannedView
from hf_precond.views.shards import chunk_ranges

InitState = Callable[[Key, Shape, torch.device], State]
"""(key, shape, device) -> the state of a stack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """A state tensor of a whole piece.

    Attributes:
        key: inside ``state[param]``.
        axes: how many of its first dimensions are those of the piece ``[G, M, B]``.
    """

    piece: PlannedView
    name: str
    key: str
    shape: torch.Size
    dtype: torch.dtype
    axes: int

    def cut(self, whole: Tensor, extent: Extent | None) -> Tensor:
        """Returns the part of a whole tensor that belongs to an extent."""
        whole = whole.reshape(self.shape)
        return whole if extent is None else whole[self._index(extent)]

    def _index(self, extent: Extent) -> tuple[slice, ...]:
        ranges = (extent.groups, extent.rows, extent.columns)
        return tuple(slice(*pair) for pair in ranges[: self.axes])


class GlobalState:
    """The whole state of an optimizer whose work is shared.

    Args:
        pieces: all views of all parameters.
        init: allocates the state of a stack.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        pieces: Sequence[PlannedView],
        sharding: Sharding,
        init: InitState,
    ) -> None:
        self._params, self._sharding = params, sharding
        self._tensors = [tensor for piece in pieces for tensor in state_tensors(piece, init)]
        self._shares: dict[int, list[Share]] = defaultdict(list)
        for share in sharding.work.shares:
            self._shares[share.view.piece].append(share)

    def localized(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns saved state with what this rank's shares need cut out of the whole tensors."""
        found = [dict(entry) for entry in saved]
        rank = self._sharding.comm.rank
        for tensor in self._tensors:
            whole = found[tensor.piece.param].get(tensor.key)
            if whole is None:
                continue
            # All ranks take part, whether they need it or not.
            whole = whole.full_tensor() if is_dtensor(whole) else whole
            for share in self._shares[tensor.piece.piece]:
                if share.rank in (None, rank):
                    key = part_key(tensor.key, share.view.extent)
                    found[tensor.piece.param][key] = tensor.cut(whole, share.view.extent)
        return found

    def whole(
        self, banks: Sequence[Bank], *, as_dtensors: bool = False, first_rank_only: bool = False
    ) -> Iterator[tuple[int, str, Tensor | None]]:
        """Yields (parameter index, key, tensor) of all state.

        Args:
            as_dtensors: leaves on its rank what can be told as a DTensor.
            first_rank_only: other ranks get None in place of tensors.
        """
        parts = {
            (slot.piece, str(slot.extent), name): value[slot.start : slot.stop]
            for bank in banks
            for slot in bank.bucket.slots
            for name, value in bank.tensors.items()
        }
        for tensor in self._tensors:
            own = [
                (share, parts[tensor.piece.piece, str(share.view.extent), tensor.name])
                for share in self._shares[tensor.piece.piece]
                if share.rank in (None, self._sharding.comm.rank)
            ]
            found = self._as_dtensor(tensor, own) if as_dtensors else None
            if found is None:
                found = self._summed(tensor, own, first_rank_only)
            yield tensor.piece.param, tensor.key, found

    def _summed(
        self, tensor: StateTensor, own: Sequence[tuple[Share, Tensor]], first_rank_only: bool
    ) -> Tensor | None:
        """The whole tensor, each of its parts from the first rank that has it."""
        comm = self._sharding.comm
        device = local(self._params[tensor.piece.param]).device
        shares = self._shares[tensor.piece.piece]
        if all(share.rank is None for share in shares):
            return own[0][1] if comm.is_first or not first_rank_only else None
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        leaders = self._sharding.work.leaders.get(tensor.piece.piece)
        for share, part in own:
            extent = share.view.extent
            if extent is None:
                whole.copy_(part)
                continue
            place = tensor.cut(whole, extent)
            if tensor.axes == 1 and leaders is not None:
                groups = range(*extent.groups)
                mine = [i for i, group in enumerate(groups) if leaders[group] == comm.rank]
                place[mine] = part[mine]
            else:
                place.copy_(part)
        if first_rank_only:
            comm.sum_on_first_(whole)
            return whole if comm.is_first else None
        return comm.sum([whole])[0]

    def _as_dtensor(self, tensor: StateTensor, own: Sequence[tuple[Share, Tensor]]) -> Any | None:
        """The tensor as a DTensor beside its parameter, where its rows are cut alike."""
        param = self._params[tensor.piece.param]
        home = self._sharding.homes[tensor.piece.param]
        shares = self._shares[tensor.piece.piece]
        if not home.ranges or any(share.view.extent is None for share in shares):
            return None
        if is_flat(tensor.piece):
            part = _joined([value for _, value in own], tensor.dtype, param)
            return _dtensor(part.view(local(param).shape), param, param.shape, 0)
        groups, blocks, _ = tensor.piece.view.shape
        if tensor.axes < 2:
            return None
        size = self._sharding.comm.size
        flat = [[(0, 0)] for _ in range(size)]
        inner = [[(0, 0)] for _ in range(size)]
        for share in shares:
            extent = share.view.extent
            assert extent is not None
            assert share.rank is not None
            (first, last), (low, high) = extent.groups, extent.rows
            flat[share.rank].append((first * blocks + low, (last - 1) * blocks + high))
            if (first, last) == (0, groups):
                inner[share.rank].append((low, high))
        tail = tensor.shape[2:]
        if _is_chunked(flat, groups * blocks) and all(
            extent_is_run(share.view.extent, blocks) for share in shares
        ):
            part = _joined([v.reshape(-1, *tail) for _, v in own], tensor.dtype, param, tail)
            return _dtensor(part, param, (groups * blocks, *tail), 0)
        if sum(map(len, inner)) == sum(map(len, flat)) and _is_chunked(inner, blocks):
            empty = torch.zeros(groups, 0, *tail, dtype=tensor.dtype, device=local(param).device)
            part = own[0][1] if own else empty
            return _dtensor(part, param, (groups, blocks, *tail), 1)
        return None


def state_tensors(piece: PlannedView, init: InitState) -> list[StateTensor]:
    """Returns the state tensors of a whole piece."""
    groups, rows, columns = piece.view.shape
    key, meta = piece.key, torch.device("meta")
    here = init(key, (groups, rows, columns), meta)
    longer = init(key, (groups, rows + 1, columns), meta)
    wider = init(key, (groups, rows, columns + 1), meta)
    found = []
    for name, value in here.items():
        by_rows = value.shape != longer[name].shape
        elementwise = (
            by_rows and value.ndim == 3 and wider[name].shape == (groups, rows, columns + 1)
        )
        found.append(
            StateTensor(
                piece=piece,
                name=name,
                key=f"{piece.view.name}.{name}" if piece.view.name else name,
                shape=value.shape,
                dtype=value.dtype,
                axes=3 if elementwise else 2 if by_rows else 1,
            )
        )
    return found


def extent_is_run(extent: Extent | None, blocks: int) -> bool:
    """Whether an extent's blocks follow each other in the order of all groups' blocks."""
    assert extent is not None
    return extent.groups[1] - extent.groups[0] == 1 or extent.rows == (0, blocks)


def _is_chunked(runs: Sequence[Sequence[tuple[int, int]]], length: int) -> bool:
    """Whether each rank's runs, one after the other, are its chunk of ``range(length)``."""
    for of_rank, (start, stop) in zip(runs, chunk_ranges(length, len(runs)), strict=True):
        place = start
        for low, high in of_rank[1:]:
            if low != place:
                return False
            place = high
        if place != stop:
            return False
    return True


def _joined(
    parts: Sequence[Tensor], dtype: torch.dtype, param: Tensor, tail: Sequence[int] = ()
) -> Tensor:
    if parts:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return torch.zeros(0, *tail, dtype=dtype, device=local(param).device)


def _dtensor(part: Tensor, param: Tensor, shape: Sequence[int], dim: int) -> Any:
    """``part`` as this rank's share of a tensor cut along ``dim`` as a parameter is along rows."""
    from torch.distributed.tensor import DTensor, Shard

    placements = [
        placement if placement.is_replicate() else Shard(dim)
        for placement in param.placements  # type: ignore[attr-defined]
    ]
    part = part.contiguous()
    if part.storage_offset():
        part = part.clone()  # torch.save cannot write a DTensor that begins inside its storage
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(
        part,
        param.device_mesh,  # type: ignore[attr-defined]
        placements,
        run_check=False,
        shape=size,
        stride=stride,
    )
