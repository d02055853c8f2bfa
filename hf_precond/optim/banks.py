"""State of a bucket: tensors stacked over groups, seen per parameter as slices of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_precond.views.plan import Bucket, Slot


class Bank:
    """The stacked state of one bucket; every tensor has leading dimension G.

    ``optimizer.state[param]`` holds slices of these tensors, so that saving and loading per
    parameter and batched work see the same memory.
    """

    def __init__(
        self, bucket: Bucket, tensors: dict[str, Tensor], phases: Sequence[float] = ()
    ) -> None:
        self.bucket = bucket
        self.tensors = tensors
        self.phases = phases
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
        """Selects the state of some slots; all slots give the bank's own tensors without a copy."""
        if len(slots) == len(self.bucket.slots):
            return self._all
        index = torch.cat([torch.arange(slot.start, slot.stop) for slot in slots])
        index = index.to(self.bucket.key[1])
        picked = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
        return BankRows(self, slots, picked, index)


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

    def commit(self) -> None:
        """Writes selected rows back; nothing to do where the bank's own tensors were used."""
        if self._index is None:
            return
        for name, tensor in self.bank.tensors.items():
            tensor.index_copy_(0, self._index, self.state[name])

    def owner(self, scope: str) -> Tensor:
        """Index of the parameter, view or group that each group belongs to, ``[G]``."""
        if scope not in self._owners:
            numbers = [number for slot in self._slots for number in slot.owners(scope)]
            self._owners[scope] = torch.tensor(numbers, device=self.bank.bucket.key[1])
        return self._owners[scope]


def state_key(slot: Slot, name: str) -> str:
    """Key of a state tensor inside ``state[param]``: ``"basis"``, or ``"q.basis"`` for a piece."""
    return f"{slot.view.name}.{name}" if slot.view.name else name
