"""Counting what one rank hands to collectives: how often, how much, and the largest piece.

Collectives are seen where they are dispatched, whoever calls them: torch.distributed's functions,
functional collectives, FSDP2's and DTensor's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Position of what a rank sends among the arguments; outputs come first where both are there.
_SENT = {
    "c10d": {
        "allreduce_": 0,
        "allreduce_coalesced_": 0,
        "allgather_": 1,
        "_allgather_base_": 1,
        "allgather_coalesced_": 1,
        "allgather_into_tensor_coalesced_": 1,
        "_reduce_scatter_base_": 1,
        "reduce_scatter_": 1,
        "reduce_scatter_tensor_coalesced_": 1,
        "alltoall_base_": 1,
        "alltoall_": 1,
        "broadcast_": 0,
        "gather_": 1,
        "reduce_": 0,
        "scatter_": 1,
        "send": 0,
    },
    "_c10d_functional": {
        "all_reduce": 0,
        "all_reduce_": 0,
        "all_reduce_coalesced": 0,
        "all_gather_into_tensor": 0,
        "all_gather_into_tensor_coalesced": 0,
        "reduce_scatter_tensor": 0,
        "reduce_scatter_tensor_coalesced": 0,
        "all_to_all_single": 0,
        "broadcast": 0,
    },
}
_SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_"}
_SILENT |= {"wait_tensor", "_wrap_tensor_autograd"}
_KINDS = {
    "all_reduce": ("allreduce", "all_reduce"),
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_to_all": ("alltoall", "all_to_all"),
}


@dataclass(slots=True)
class Traffic:
    """Of one kind of collective: calls, bytes this rank put in, elements of the largest call."""

    calls: int = 0
    sent: int = 0
    largest: int = 0


class Wire(TorchDispatchMode):
    """While it is entered, adds up all collectives of this rank in :attr:`traffic`, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[str, Traffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts a collective and lets it pass."""
        if any(issubclass(kind, DTensor) for kind in types):
            # It is asked again for each local operation, and each collective, of a DTensor's.
            return NotImplemented
        known = _SENT.get(func.namespace)
        if known is not None:
            name = func._schema.name.partition("::")[2]
            if name not in _SILENT:
                self._count(name, args[known[name]])
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, sent: Any) -> None:
        entry = self.traffic.setdefault(_kind(name), Traffic())
        tensors = list(_tensors(sent))
        entry.calls += 1
        entry.sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        entry.largest = max(entry.largest, sum(tensor.numel() for tensor in tensors))

    @property
    def sent(self) -> int:
        """Bytes of all kinds."""
        return sum(entry.sent for entry in self.traffic.values())

    @property
    def largest(self) -> int:
        """Elements of the largest call of all."""
        return max((entry.largest for entry in self.traffic.values()), default=0)


def table(traffic: Mapping[str, Traffic]) -> str:
    """One line per kind, for messages of failed tests."""
    return "\n".join(
        f"{kind}: {entry.calls} calls, {entry.sent} bytes, at most {entry.largest} elements"
        for kind, entry in sorted(traffic.items())
    )


def _kind(name: str) -> str:
    for kind, parts in _KINDS.items():
        if any(part in name for part in parts):
            return kind
    return name.strip("_")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)
