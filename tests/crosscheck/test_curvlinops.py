"""K-FAC's factors against ``curvlinops``' ``KFACLinearOperator`` of the empirical Fisher.

Compared is what the factors stand for, Gbar (x) Abar, because a factor of scale may lie on either
side. Both take the loss as a mean over N samples of R terms each (R: tokens of a sequence with a
label; one for an image), a layer having S positions in a sample:

    Abar      expand: mean of a a^T over N S positions; reduce: of mean inputs over N samples. Same.
    Gbar      theirs: N R sum g g^T in both forms, g the gradient of the mean loss;
              ours: N S sum g g^T (expand), N sum (sum_s g)(sum_s g)^T (reduce).

So ours is S / R times theirs with expand, and 1 / R times with reduce. Our damping is a share of
the largest eigenvalue: the step's direction does not depend on that number.

Differences: their damping is absolute, one number or two; their bias is an input of ones with
``separate_weight_and_bias=False``, as ours always is.

Not in the crosscheck extra: with BackPACK it brings torchvision and scipy, and with torchvision
transformers processes images in another way. In an environment of its own, or to a folder on
PYTHONPATH: ``pip install --target FOLDER curvlinops-for-pytorch==3.0.1``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_precond import create_optimizer
from tests.driving import BARE, assert_near

curvlinops = pytest.importorskip(
    "curvlinops", reason="another library, with heavy dependencies: curvlinops-for-pytorch==3.0.1"
)

TOLERANCE = 1e-10
SAMPLES, LENGTH, CLASSES = 6, 4, 3


class ClassesFirst(nn.Module):
    """Logits ``[N, S, C]`` as the cross entropy of sequences takes them: ``[N, C, S]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def vectors() -> tuple[nn.Module, Tensor, Tensor]:
    """S = R = 1."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES, bias=False))
    return model, torch.randn(SAMPLES, 5), torch.randint(CLASSES, (SAMPLES,))


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """A label for each position: S = R."""
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)]
    model = nn.Sequential(*layers, ClassesFirst())
    x = torch.randn(SAMPLES, LENGTH, 5)
    return model, x, torch.randint(CLASSES, (SAMPLES, LENGTH))


def pooled_sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """One label for four positions of the first layer: S = 4, R = 1; then S = 1."""
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * LENGTH, CLASSES)]
    x = torch.randn(SAMPLES, LENGTH, 5)
    return nn.Sequential(*layers), x, torch.randint(CLASSES, (SAMPLES,))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """Convolutions with padding and with a stride: S = 25 and 6, R = 1."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, (2, 3), stride=2, padding=(1, 0), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    return model, torch.randn(SAMPLES, 2, 5, 5), torch.randint(CLASSES, (SAMPLES,))


POSITIONS: dict[Any, dict[str, int]] = {
    vectors: {"0": 1, "2": 1},
    sequences: {"0": LENGTH, "2": LENGTH},
    pooled_sequences: {"0": LENGTH, "3": 1},
    images: {"0": 25, "2": 6, "5": 1},
}


@pytest.fixture(autouse=True)
def double() -> Any:
    """Models, inputs and what the library makes of them in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs(model: nn.Module, params: list[Tensor], x: Tensor, y: Tensor, approx: str) -> Any:
    return curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        params,
        [(x, y)],
        fisher_type="empirical",
        kfac_approx=approx,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


def one_step(
    model: nn.Module, x: Tensor, y: Tensor, approx: str, **options: Any
) -> torch.optim.Optimizer:
    """K-FAC after one step, its factors those of this one batch."""
    settings = {"state_dtype": "float64", "update_interval": 1, "inverse_interval": 1, **options}
    optimizer = create_optimizer(model, "kfac", weight_sharing=approx, **BARE, **settings)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def product_of_factors(state: dict[str, Tensor]) -> Tensor:
    """Gbar (x) Abar in the order of the library: the weight row by row, then the bias."""
    whole = torch.kron(state["output_factor"][0], state["input_factor"][0])
    outputs, inputs = (state[f"{side}_factor"].shape[-1] for side in ("output", "input"))
    numbers = torch.arange(outputs * inputs).view(outputs, inputs)
    return whole[_joined(numbers)][:, _joined(numbers)]


def _joined(numbers: Tensor) -> Tensor:
    return torch.cat([numbers[:, :-1].flatten(), numbers[:, -1]])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("make", POSITIONS)
def test_factors_have_the_same_product(make: Any, approx: str) -> None:
    model, x, y = make()
    loss_terms = y.numel() // len(y)
    layers = {name: model.get_submodule(name) for name in POSITIONS[make]}
    expected = {}
    for name, layer in layers.items():
        params = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        size = sum(param.numel() for param in params)
        expected[name] = theirs(model, params, x, y, approx) @ torch.eye(size)
    optimizer = one_step(model, x, y, approx)
    for name, layer in layers.items():
        state = optimizer.state[layer.weight]
        if layer.bias is None:
            found = torch.kron(state["output_factor"][0], state["input_factor"][0])
        else:
            found = product_of_factors(state)
        positions = POSITIONS[make][name] if approx == "expand" else 1
        assert_near(found, positions / loss_terms * expected[name], TOLERANCE, name)


@pytest.mark.parametrize("damping", [0.1, 0.01])
def test_step_is_the_damped_inverse(damping: float) -> None:
    """With the absolute damping of each factor that ours comes to."""
    model, x, y = vectors()
    layer = model[0]
    params = [layer.weight, layer.bias]
    forward = theirs(model, params, x, y, "expand")
    forward @ torch.eye(24)  # computes its factors, at these weights
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    start = [param.detach().clone() for param in params]
    optimizer = one_step(model, x, y, "expand", lr=1.0, damping=damping)
    state = optimizer.state[layer.weight]
    shifts = tuple(
        damping * torch.linalg.eigvalsh(state[f"{side}_factor"][0])[-1].item()
        for side in ("input", "output")
    )
    inverse = curvlinops.KFACInverseLinearOperator(forward, damping=shifts)
    expected = inverse @ torch.cat([grad.flatten() for grad in grads])
    step = torch.cat([(a - b).detach().flatten() for a, b in zip(start, params, strict=True)])
    assert_near(step, expected, TOLERANCE)
