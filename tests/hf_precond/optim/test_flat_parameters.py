"""Engines that flatten parameters are refused with one message that says what to use instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_precond import create_optimizer


class FlatParameter(nn.Parameter):
    """Has the name by which FSDP version 1's is told."""


class FullyShardedDataParallel(nn.Module):
    """Has the name of FSDP version 1's wrapper; with use_orig_params its parameters have not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_fsdp1_flat_parameters_are_refused() -> None:
    flat = FlatParameter(torch.zeros(12))
    with pytest.raises(ValueError, match=r"FSDP version 1 .*flat.*fsdp_version: 2"):
        create_optimizer([flat], "soap")


def test_fsdp1_models_are_refused() -> None:
    model = FullyShardedDataParallel(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"FSDP version 1 .*fsdp_version: 2"):
        create_optimizer(model, "soap")


def test_zero3_parameters_are_refused() -> None:
    param = nn.Parameter(torch.zeros(0))
    param.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 .*fsdp_version: 2"):
        create_optimizer([param], "soap")
