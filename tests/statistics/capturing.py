"""Captures of small models, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_precond import PreconditionedOptimizer, create_optimizer
from hf_precond.statistics.captured import Captured
from hf_precond.statistics.layer_io import LayerIO
from hf_precond.statistics.layers import layer_kind

STEP = 1
PLAIN: dict[str, Any] = {
    "graft": "none",
    "momentum": "none",
    "damping": 0.1,
    "update_interval": 1,
    "inverse_interval": 1,
    "state_dtype": "float64",
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    """One layer on 11 tokens, the same weights at every call."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **options})
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def armed(model: nn.Module, **options: Any) -> LayerIO:
    """A capture of all layers of a model, ready for its first step."""
    layers = {
        f"{name}.weight" if name else "weight": layer
        for name, layer in model.named_modules()
        if layer_kind(layer) is not None
    }
    io = LayerIO(model, layers, **{"dtype": torch.float64, **options})
    io.arm(dict.fromkeys(layers, STEP))
    return io


def capture(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], **options: Any
) -> dict[str, Captured]:
    """What the layers see while some losses go backward one after the other, scaled."""
    io = armed(model, **options)
    for loss in losses:
        loss().backward()
    found = io.take()
    io.remove()
    return found


def product(captured: Captured) -> Tensor:
    """Sum over all positions of output gradient times input, ``[F_out, F_in]``."""
    return torch.einsum("nsm,nsb->mb", captured.outputs, captured.inputs)


def gram(x_NSF: Tensor) -> Tensor:
    """Second moment of columns, ``[F, F]``: the order of the positions does not matter."""
    flat = x_NSF.flatten(0, 1)
    return flat.mT @ flat


def kfac(model: Any, *, lr: float = 0.01, **options: Any) -> PreconditionedOptimizer:
    """K-FAC with nothing around it, refreshed at every step."""
    return create_optimizer(model, "kfac", lr=lr, **{**PLAIN, **options})


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [param.detach().clone() for param in model.parameters()]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all state tensors in the order of the parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        value.clone() for param in params for _, value in sorted(optimizer.state[param].items())
    ]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal shapes, and equal up to ``tolerance`` times the largest expected entry."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(expected.abs().max().item(), 1e-30), difference


def assert_all_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-12
) -> None:
    """The same for several tensors in order."""
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, tolerance)


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def same_captures(
    actual: dict[str, Captured], expected: dict[str, Captured], tolerance: float = 1e-12
) -> None:
    """Equal columns of equal layers."""
    assert actual.keys() == expected.keys()
    for name, item in expected.items():
        assert_close(actual[name].inputs, item.inputs, tolerance)
        assert_close(actual[name].outputs, item.outputs, tolerance)
        assert_close(actual[name].valid, item.valid, tolerance)
        assert actual[name].complete == item.complete
