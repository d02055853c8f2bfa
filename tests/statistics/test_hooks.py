"""What is captured in every way to run a model, and that nothing is where nothing is wanted."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_precond import create_optimizer
from hf_precond.optim.layer_columns import LayerColumns
from hf_precond.statistics.layer_io import LayerIO
from tests.statistics.capturing import (
    armed,
    assert_all_close,
    assert_close,
    assert_equal,
    capture,
    gram,
    kfac,
    product,
    same_captures,
    state_of,
    weights,
)


class Mlp(nn.Module):
    """Two layers, a shared one used twice, and the usual ways to compute activations."""

    def __init__(self, *, inplace: bool = False, recompute: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.shared = nn.Linear(4, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)
        self.inplace, self.recompute = inplace, recompute
        self.double()

    def block(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x), inplace=self.inplace)
        hidden = F.relu(self.shared(hidden), inplace=self.inplace)
        return F.leaky_relu(self.shared(hidden), inplace=self.inplace)

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.head(self.block(x))
        reentrant = self.recompute == "reentrant"
        # The reentrant kind wants an input with a gradient.
        x = x.requires_grad_(reentrant)
        return self.head(checkpoint(self.block, x, use_reentrant=reentrant))


def inputs(samples: int = 8, seed: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, generator=rng, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """The weights after some steps."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs(seed=step)).backward()
        optimizer.step()
    assert all(weight.isfinite().all() for weight in weights(model))
    return weights(model)


def num_hooks(model: nn.Module) -> int:
    """Hooks of every kind on all modules."""
    kinds = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs"))]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# -- ways to run a model --


@pytest.mark.parametrize(
    "options",
    [{"inplace": True}, {"recompute": "reentrant"}, {"recompute": "plain"}],
    ids=["inplace", "reentrant", "non-reentrant"],
)
def test_captured_once_and_the_same(options: dict[str, Any]) -> None:
    """Also of a layer that is used twice."""
    plain, other = Mlp(), Mlp(**options)
    expected = capture(plain, [lambda: loss_of(plain, inputs())])
    found = capture(other, [lambda: loss_of(other, inputs())])
    same_captures(found, expected)
    for name, item in found.items():
        gradient = other.get_parameter(name).grad
        assert gradient is not None
        assert_close(product(item), gradient)
    assert found["shared.weight"].total == 16
    assert found["first.weight"].total == 8


@pytest.mark.parametrize("recompute", ["reentrant", "plain"])
def test_training_under_checkpointing_is_the_same(recompute: str) -> None:
    plain, other = Mlp(), Mlp(recompute=recompute, inplace=True)
    expected = train(plain, kfac(plain))
    assert_all_close(train(other, kfac(other)), expected, 1e-10)


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("pieces", [2, 3])
def test_micro_batches_are_one_batch(by_sample: bool, reduce: bool, pieces: int) -> None:
    if by_sample and reduce:
        by_sample = False
    model = nn.Linear(4, 3).double()
    x = torch.randn(8, 5, 4, dtype=torch.float64)
    options = {"by_sample": by_sample, "reduce": reduce}
    whole = capture(model, [lambda: loss_of(model, x)], **options)
    parts = x.tensor_split(pieces)
    halves = capture(
        model,
        [lambda part=part: loss_of(model, part) * len(part) / 8 for part in parts],
        **options,
    )
    same_captures(halves, whole)


def test_micro_batches_train_as_one_batch() -> None:
    whole, cut = Mlp(), Mlp()
    ours, theirs = kfac(cut), kfac(whole)
    train(whole, theirs)
    for step in range(3):
        ours.zero_grad()
        for part in inputs(seed=step).chunk(2):
            (loss_of(cut, part) / 2).backward()
        ours.step()
    assert_all_close(weights(cut), weights(whole), 1e-10)
    assert_all_close(state_of(ours), state_of(theirs), 1e-9)


def test_two_uses_in_one_batch_belong_to_the_same_samples() -> None:
    """Per-sample gradients are whole: a layer used twice has twice the positions, as in ALBERT."""
    model = Mlp()
    found = capture(model, [lambda: loss_of(model, inputs())], by_sample=True)["shared.weight"]
    gradient = model.shared.weight.grad
    assert gradient is not None
    assert_close(product(found), gradient)
    assert found.inputs.shape[:2] == (8, 2)


def test_outputs_of_two_calls_go_backward_together() -> None:
    """Two calls with other masks before one backward pass: each output knows its own mask."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.layer(x).sin() * attention_mask.unsqueeze(-1)).sum()

    model = Masked()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    masks = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = capture(
        model,
        [lambda: model(x, attention_mask=masks[0]) + model(x, attention_mask=masks[1])],
    )["layer.weight"]
    assert int(found.total) == 3 + 5
    assert model.layer.weight.grad is not None
    assert_close(product(found), model.layer.weight.grad)


def test_autocast_gives_statistics_in_float32() -> None:
    torch.manual_seed(0)
    model = Mlp().float()
    x = inputs(64).float()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    found = capture(model, [loss], dtype=torch.float32)
    for name, item in found.items():
        assert item.inputs.dtype == item.outputs.dtype == torch.float32
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert_close(product(item), gradient, 0.02)
    # The input of the first layer is what came in, not what was rounded.
    assert_close(found["first.weight"].inputs.squeeze(1) * 8, x, 1e-6)
    optimizer = kfac(model, state_dtype="float32")
    loss().backward()
    optimizer.step()
    assert all(value.dtype == torch.float32 for value in state_of(optimizer))


def test_a_changed_input_is_not_mistaken_for_the_one_seen() -> None:
    """Under autocast a layer saves a copy of its input, which may then be changed in place."""
    model = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    original = x.clone()
    io = armed(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    x.zero_()
    y.float().square().mean().backward()
    found = io.take()
    if found:
        assert_close(found["weight"].inputs.squeeze(1) * 8**0.5, original, 1e-6)


def test_bf16_weights_give_statistics_in_the_state_dtype() -> None:
    model = nn.Linear(4, 3).bfloat16()
    x = torch.randn(8, 4).bfloat16()
    found = capture(model, [lambda: model(x).square().mean()], dtype=torch.float32)["weight"]
    assert found.inputs.dtype == found.outputs.dtype == found.valid.dtype == torch.float32
    assert_close(found.inputs.squeeze(1) * 8**0.5, x.float(), 1e-6)


# -- nothing where nothing is wanted --


def test_nothing_is_captured_in_evaluation_or_without_gradients() -> None:
    model = Mlp()
    io = armed(model)
    model.eval()
    loss_of(model, inputs()).backward()
    model.train()
    with torch.no_grad():
        loss_of(model, inputs())
    with torch.inference_mode():
        loss_of(model, inputs())
    assert io.take() == {}


def test_evaluation_between_micro_batches_changes_nothing() -> None:
    model = Mlp()
    expected = capture(
        model, [lambda part=part: loss_of(model, part) / 2 for part in inputs().chunk(2)]
    )
    model.zero_grad()

    def after_evaluation(part: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            model(inputs(5))
        model(inputs(5)).sum().backward(inputs=[model.head.bias])
        model.train()
        return loss_of(model, part) / 2

    found = capture(model, [lambda part=part: after_evaluation(part) for part in inputs().chunk(2)])
    same_captures(found, expected)


def test_nothing_is_captured_before_arming() -> None:
    model = nn.Linear(4, 3).double()
    io = LayerIO(model, {"weight": model}, dtype=torch.float64)
    loss_of(model, inputs()).backward()
    assert io.take() == {}
    io.arm({})
    loss_of(model, inputs()).backward()
    assert io.take() == {}


def test_arming_drops_what_was_captured() -> None:
    model = nn.Linear(4, 3).double()
    io = armed(model)
    loss_of(model, inputs()).backward()
    assert io.take().keys() == {"weight"}
    io.arm({"weight": 2})
    assert io.take() == {}


def test_plain_steps_put_no_hook_on_outputs() -> None:
    model = Mlp()
    optimizer = kfac(model, update_interval=3, inverse_interval=3)
    # Registered after those of the optimizer, it sees what they did.
    hooked: list[bool] = []
    model.first.register_forward_hook(
        lambda module, args, output: hooked.append(bool(output._backward_hooks))
    )
    kept = []
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, inputs(seed=step)).backward()
        source = optimizer._capture.source
        assert isinstance(source, LayerColumns)
        records = source._io._records.values()
        kept.append(all(record.pending for record in records))
        optimizer.step()
        assert not any(record.pending for record in records)
    assert hooked == kept == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("reset", ["model", "optimizer", "by_hand"])
def test_a_step_that_never_came_does_not_mix(reset: str) -> None:
    """A batch goes backward, its step is given up, and the next batch is trained on."""
    model, other = Mlp(), Mlp()
    optimizer, expected = kfac(model), kfac(other)
    loss_of(model, inputs(5, seed=9)).backward()
    if reset == "by_hand":
        for param in model.parameters():
            param.grad = None
    else:
        {"model": model, "optimizer": optimizer}[reset].zero_grad()
    loss_of(model, inputs()).backward()
    optimizer.step()
    loss_of(other, inputs()).backward()
    expected.step()
    assert_equal(weights(model), weights(other))
    assert_equal(state_of(optimizer), state_of(expected))


def test_a_step_that_never_came_with_zeroed_gradients() -> None:
    model, other = Mlp(), Mlp()
    optimizer, expected = kfac(model), kfac(other)
    loss_of(model, inputs(5, seed=9)).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, inputs()).backward()
    optimizer.step()
    loss_of(other, inputs()).backward()
    expected.step()
    assert_equal(weights(model), weights(other))
    assert_equal(state_of(optimizer), state_of(expected))


# -- hooks come and go --


def test_hooks_are_removed() -> None:
    model = Mlp()
    before = num_hooks(model)
    optimizer = kfac(model)
    attached = num_hooks(model)
    assert attached > before
    optimizer.attach(model)
    optimizer.attach(model)
    assert num_hooks(model) == attached
    optimizer.detach()
    optimizer.detach()
    assert num_hooks(model) == before


def test_attaching_twice_counts_once() -> None:
    model, other = Mlp(), Mlp()
    optimizer = kfac(model)
    optimizer.attach(model)
    assert_equal(train(model, optimizer), train(other, kfac(other)))


def test_attaching_between_steps_goes_on() -> None:
    model, other = Mlp(), Mlp()
    optimizer = kfac(model)
    expected = train(other, kfac(other), steps=4)
    for step in range(4):
        optimizer.detach()
        optimizer.attach(model)
        optimizer.zero_grad()
        loss_of(model, inputs(seed=step)).backward()
        optimizer.step()
    assert_equal(weights(model), expected)


def test_hooks_of_an_optimizer_that_is_gone_do_nothing() -> None:
    model = Mlp()
    train(model, kfac(model), steps=1)
    gc.collect()
    outputs = []
    model.first.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss_of(model, inputs()).backward()
    assert not outputs[0]._backward_hooks
    # A second optimizer on the same model is not disturbed.
    fresh = Mlp()
    fresh.load_state_dict(model.state_dict())
    model.zero_grad()
    assert_equal(train(model, kfac(model)), train(fresh, kfac(fresh)))


def test_two_optimizers_on_one_model() -> None:
    """Each captures for itself."""
    model, other = Mlp(), Mlp()
    first, expected = kfac(model, lr=0.0), kfac(other, lr=0.0)
    second = kfac(model, lr=0.0, update_interval=2)
    for step in range(3):
        for each, optimizers in ((model, (first, second)), (other, (expected,))):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(each, inputs(seed=step)).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_equal(state_of(first), state_of(expected))


def copied(x: Any) -> Any:
    return copy.deepcopy(x)


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copy_of", [copied, pickled])
def test_copies_capture_nothing_until_attached(copy_of: Callable[[Any], Any]) -> None:
    model = Mlp()
    optimizer = kfac(model)
    train(model, optimizer)
    other, theirs = copy_of((model, optimizer))
    outputs = []
    other.first.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss_of(other, inputs()).backward()
    assert not outputs[0]._backward_hooks
    with pytest.raises(RuntimeError, match=r"optimizer\.attach\(model\)"):
        theirs.step()
    theirs.attach(other)
    assert_equal(train(other, theirs), train(model, optimizer))
    assert_equal(state_of(theirs), state_of(optimizer))


@pytest.mark.parametrize("copy_of", [copied, pickled])
def test_a_copy_of_the_model_does_not_feed_the_original(copy_of: Callable[[Any], Any]) -> None:
    model, other = Mlp(), Mlp()
    optimizer = kfac(model)
    twin = copy_of(model)
    loss_of(twin, inputs(5, seed=9)).backward()
    assert_equal(train(model, optimizer), train(other, kfac(other)))


def test_gram_matrices_do_not_depend_on_the_batch_size() -> None:
    """The same batch twice over has the same second moments."""
    model = nn.Linear(4, 3).double()
    once = capture(model, [lambda: loss_of(model, inputs())])["weight"]
    twice = capture(model, [lambda: loss_of(model, inputs().repeat(2, 1))])["weight"]
    assert_close(gram(twice.inputs), gram(once.inputs))
    assert_close(gram(twice.outputs), gram(once.outputs))


def test_a_layer_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="'weight': Embedding"):
        LayerIO(nn.Module(), {"weight": nn.Embedding(3, 4)}, dtype=torch.float32)


def test_layers_need_not_be_asked_for() -> None:
    """An algorithm that needs gradients only puts no hook on the model."""
    model = Mlp()
    create_optimizer(model, "shampoo", lr=0.1)
    assert num_hooks(model) == 0
