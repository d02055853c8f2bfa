"""State of a bucket: tensors stacked over groups, seen per parameter as slices of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from hf_precond.linalg.rounding import round_stochastically
from hf_precond.views.plan import Bucket, Extent, Slot


class Bank:
    """The stacked state of one bucket; every tensor has leading dimension G.

    ``optimizer.state[param]`` holds slices of these tensors, so that saving and loading per
    parameter and batched work see the same memory.

    Args:
        dtype: in which tensors are worked on; those of another dtype are kept in fewer bits.
    """

    def __init__(
        self,
        bucket: Bucket,
        tensors: dict[str, Tensor],
        phases: Sequence[float] = (),
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.bucket = bucket
        self.tensors = tensors
        self.phases = phases
        self.dtype = dtype
        self._all = BankRows(self, bucket.slots, tensors, None)

    def slices(self) -> Iterator[tuple[Slot, str, Tensor]]:
        """Yields (slot, key, slice) of every tensor; the key names piece and tensor."""
        for slot in self.bucket.slots:
            for name, tensor in self.tensors.items():
                yield slot, state_key(slot, name), tensor[slot.start : slot.stop]

    def adopt(self, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Copies saved state, per parameter index, into the bank's own dtype and device."""
        for slot, key, piece in self.slices():
            source = saved[slot.param].get(key)
            if source is not None and source.data_ptr() != piece.data_ptr():
                piece.copy_(source.reshape(piece.shape))

    def rows(self, slots: Sequence[Slot]) -> BankRows:
        """Selects the state of some slots, in the dtype it is worked on.

        All slots give the bank's own tensors without a copy, where they have that dtype.
        """
        if len(slots) == len(self.bucket.slots):
            rows = copy(self._all)
            rows.state = self._worked_on(self.tensors)
            return rows
        index = torch.cat([torch.arange(slot.start, slot.stop) for slot in slots])
        index = index.to(self.bucket.key.device)
        picked = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
        return BankRows(self, slots, self._worked_on(picked), index)

    def _worked_on(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}


class BankRows:
    """State of some slots of a bank, to be worked on in place and then committed.

    Attributes:
        phases: when a staggered refresh of each group is due, see :class:`StepContext`.
    """

    def __init__(
        self, bank: Bank, slots: Sequence[Slot], state: dict[str, Tensor], index: Tensor | None
    ) -> None:
        self.bank = bank
        self.state = state
        self.phases = [phase for slot in slots for phase in bank.phases[slot.start : slot.stop]]
        self._slots = slots
        self._index = index
        self._owners: dict[str, Tensor] = {}

    def commit(self, step: int) -> None:
        """Writes rows back; nothing to do where the bank's own tensors were used.

        Args:
            step: of the rows' parameters, for the noise of the rounding to fewer bits.
        """
        for name, tensor in self.bank.tensors.items():
            value = self.state[name]
            if value is tensor:
                continue
            if value.dtype != tensor.dtype:
                value = round_stochastically(value, tensor.dtype, step)
            if self._index is None:
                tensor.copy_(value)
            else:
                tensor.index_copy_(0, self._index, value)

    def owner(self, scope: str) -> Tensor:
        """Index of the parameter, view or group that each group belongs to, ``[G]``."""
        if scope not in self._owners:
            numbers = [number for slot in self._slots for number in slot.owners(scope)]
            self._owners[scope] = torch.tensor(numbers, device=self.bank.bucket.key.device)
        return self._owners[scope]


def state_key(slot: Slot, name: str) -> str:
    """Key of a state tensor inside ``state[param]``: ``"basis"``, or ``"q.basis"`` for a piece."""
    return part_key(f"{slot.view.name}.{name}" if slot.view.name else name, slot.extent)


def part_key(key: str, extent: Extent | None) -> str:
    """Key of the part of a state tensor that belongs to an extent."""
    return key if extent is None else f"{key}@{extent}"


def parse_part_key(key: str) -> tuple[str, Extent | None]:
    """Inverse of :func:`part_key`.

    Raises:
        ValueError: where what follows the ``@`` is no extent.
    """
    name, at, extent = key.rpartition("@")
    return (name, Extent.parse(extent)) if at else (key, None)
