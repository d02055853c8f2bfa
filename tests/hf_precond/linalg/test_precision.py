from __future__ import annotations

import pytest
import torch

from hf_precond.linalg.precision import highest_matmul_precision


def test_precision_is_restored_even_after_an_error() -> None:
    def fail_inside() -> None:
        with highest_matmul_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError

    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError):
            fail_inside()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
