"""Optimizers and gradients for the laws, small and in float64 unless a law asks otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer, create_optimizer, option_specs
from hf_precond.preconditioners.base import Columns, layer_needs
from hf_precond.views.plan import Slot
from hf_precond.views.tiles import Tiles
from hf_precond.views.view import ParamView
from tests.reference.columns import gradient_columns

# Small enough for fast tests; each is used where an optimizer has the option.
SMALL = {
    "rank": 3,
    "update_interval": 2,
    "root_interval": 2,
    "inverse_interval": 2,
    "brand_interval": 2,
    "rsvd_interval": 4,
    "correction_interval": 4,
    "max_columns": 64,
    "start_step": 3,
    "state_dtype": "float64",
}
LR = 0.05


def build(name: str, model: Any, *, lr: float = LR, **options: Any) -> PreconditionedOptimizer:
    """Builds an optimizer; options that this one does not have are left out."""
    shell = {key: options.pop(key) for key in ("weight_decay", "rules") if key in options}
    known = {key: value for key, value in (SMALL | options).items() if key in option_specs(name)}
    return fed(create_optimizer(model, name, lr=lr, **shell, **known), model)


class GradientColumns:
    """Columns made up from gradients (tests.reference.columns), for parameters without a layer."""

    def arm(self, steps: Mapping[int, int]) -> None:
        """Nothing to prepare."""

    def collect(self, loss_scale: float | Tensor) -> None:
        """Nothing to end."""

    def clear(self) -> None:
        """Nothing to drop."""

    def columns(self, slot: Slot, gradients: Mapping[int, Tensor]) -> Columns:
        """Of each group: as many samples of one position as its whole matrix has columns."""
        gradient = gradients[slot.param]
        whole = slot.view.base if isinstance(slot.view, Tiles) else slot.view
        parts = [gradient_columns(grads) for grads in whole.to_blocks(gradient).double()]
        inputs = torch.stack([part.inputs for part in parts])
        outputs = torch.stack([part.outputs for part in parts])
        if isinstance(slot.view, Tiles):
            rows, columns = torch.meshgrid(*map(torch.arange, whole.shape[1:]), indexing="ij")
            rows, columns = (_in_tiles(slot.view, gradient, index) for index in (rows, columns))
            tiles = slot.view.tiles_per_group
            inputs = inputs.repeat_interleave(tiles, 0)
            outputs = outputs.repeat_interleave(tiles, 0)
            inputs = torch.stack([x[..., i] for x, i in zip(inputs, columns[:, 0], strict=True)])
            outputs = torch.stack([x[..., i] for x, i in zip(outputs, rows[:, :, 0], strict=True)])
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        return Columns(inputs=inputs.to(dtype), outputs=outputs.to(dtype))


def _in_tiles(view: Tiles, like: Tensor, index: Tensor) -> Tensor:
    """Row or column numbers [M, B] of a group as its tiles have them."""
    numbers = torch.zeros(like.shape, dtype=torch.long)
    view.base.copy_from_blocks(numbers, index.expand(view.base.shape))
    return view.to_blocks(numbers)


def fed(optimizer: PreconditionedOptimizer, model: Any = None) -> PreconditionedOptimizer:
    """The optimizer, with made-up columns where it needs some and has no model."""
    if layer_needs(optimizer.recipe.algorithm) and not isinstance(model, nn.Module):
        optimizer.feed(GradientColumns())
    return optimizer


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """A seeded normal parameter."""
    rng = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype))


def group(params: Iterable[Tensor], views: Sequence[Sequence[ParamView]]) -> dict[str, Any]:
    """A param group with explicit views; none for the fallback."""
    plain = [[view.to_plain() for view in of_param] for of_param in views]
    return {"params": list(params), "views": plain}


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters in group order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def random_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Seeded normal gradients in each parameter's own dtype."""
    rng = torch.Generator().manual_seed(1000 + step)
    return [
        torch.randn(param.shape, generator=rng, dtype=torch.float64).to(param.dtype)
        for param in params
    ]


Grads = Callable[[Sequence[Tensor], int], Sequence[Tensor | None]]


def run(
    optimizer: torch.optim.Optimizer, steps: Iterable[int], grads: Grads = random_grads
) -> list[Tensor]:
    """Takes the given steps and returns copies of all parameters."""
    params = params_of(optimizer)
    for step in steps:
        for param, grad in zip(params, grads(params, step), strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [param.detach().clone() for param in params]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state tensors under readable keys; the tensors themselves, not copies."""
    return {
        f"{index}.{key}": value
        for index, param in enumerate(params_of(optimizer))
        for key, value in optimizer.state[param].items()
    }


def assert_bit_equal(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "") -> None:
    """Same dtypes, shapes and bits."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype, f"{what} {index}: {a.dtype} != {b.dtype}"
        assert torch.equal(a, b), f"{what} {index}: differs by {(a - b).abs().max():.3e}"


def assert_same(
    actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float, what: str = ""
) -> None:
    """Equal up to ``tolerance`` times the largest expected entry, tensor by tensor."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = b.abs().max()
        difference = (a - b).abs().max()
        assert difference <= tolerance * scale, (
            f"{what} tensor {index}: differs by {difference:.3e} at scale {scale:.3e}"
        )
