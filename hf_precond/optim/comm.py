"""Collectives of an optimizer step, each over all its tensors in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """Returns the given process group or all processes; None where there is but one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if group is not None and dist.get_world_size(group) > 1 else None


class Comm:
    """The ranks of one process group.

    Attributes:
        rank: of this process inside the group.
        size: number of ranks.
        replicas: the ranks of other groups that do the same as this one (HSDP), if any.
    """

    def __init__(self, group: dist.ProcessGroup, replicas: Comm | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.replicas = replicas

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of all groups."""
        return self.rank == 0 and (self.replicas is None or self.replicas.is_first)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums over all ranks of tensors of one dtype and device."""
        flat = _flat(tensors)
        if flat.numel():
            dist.all_reduce(flat, group=self.group)
        return _unflat(flat, tensors)

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks of all groups."""
        (total,) = self.sum([tensor])
        return total if self.replicas is None else self.replicas.sum_everywhere(total)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Gives all ranks the first rank's tensors (of one dtype and device), in place."""
        if not tensors:
            return
        flat = _flat(tensors)
        dist.broadcast(flat, src=dist.get_global_rank(self.group, 0), group=self.group)
        for tensor, part in zip(tensors, _unflat(flat, tensors), strict=True):
            tensor.copy_(part)

    def sum_on_first_(self, tensor: Tensor) -> None:
        """Sums a tensor over all ranks, in place; only the first rank's is defined afterwards."""
        dist.reduce(tensor, dst=dist.get_global_rank(self.group, 0), group=self.group)

    def all_gather(self, flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Returns every rank's flat tensor.

        Args:
            sizes: elements of each rank's tensor; the longest one is what each rank sends.
        """
        padded = flat.new_zeros(max(sizes))
        padded[: flat.numel()] = flat
        out = flat.new_empty(self.size * padded.numel())
        if out.numel():
            # Renamed in torch 2.13.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(out, padded, group=self.group)
        return [part[:size] for part, size in zip(out.chunk(self.size), sizes, strict=True)]

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> list[Tensor]:
        """Sends each rank its part of a flat tensor; returns what came from each."""
        out = flat.new_empty(sum(receive))
        dist.all_to_all_single(out, flat, list(receive), list(send), group=self.group)
        return list(out.split(list(receive)))

    def gather_objects(self, what: Any) -> list[Any]:
        """Returns every rank's plain object."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what, group=self.group)
        return found

    def wait(self) -> None:
        """Returns when all ranks of all groups have come here."""
        dist.barrier(self.group)
        if self.replicas is not None:
            self.replicas.wait()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
