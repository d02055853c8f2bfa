from __future__ import annotations

import pytest
import torch

from hf_precond.linalg.symmetric import pack, packed_size, unpack


@pytest.mark.parametrize("size", [1, 2, 5])
def test_packing_loses_nothing(size: int) -> None:
    a = torch.randn(2, 3, size, size)
    a = a + a.mT
    packed = pack(a)
    assert packed.shape == (2, 3, packed_size(size))
    assert torch.equal(unpack(packed, size), a)
