"""Every layer method on whole models, hooks and all, against its dense reference.

The reference trains a copy of the model of its own: gradients from that copy, what its layers see
from probes (:mod:`tests.reference.layers`), one matrix of weight and bias per layer, groups as sets
of its rows and columns. It shares with the optimizer which matrices a weight is made of, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_precond import PreconditionedOptimizer, create_optimizer
from hf_precond.views.view import ParamView
from tests.reference.columns import ReferenceColumns
from tests.reference.kfac import KfacReference
from tests.reference.layers import (
    Case,
    LayerRecord,
    Loss,
    capture,
    tiny_conv_net,
    tiny_gpt2_block,
    tiny_mlp,
)
from tests.reference.pipeline import TINY_NORM, AdamReference, Graft
from tests.reference.table import REFERENCES
from tests.relatives import slow_for_relatives
from tests.suite.building import assert_same
from trainer_ext.layers import view_rules

STEPS = 8
TOLERANCE = 1e-10
# Small enough for training not to magnify rounding: a wild run is compared with another one.
LR = 1e-3
DECAY = 0.05
CASES = [tiny_mlp, tiny_gpt2_block, tiny_conv_net]
# With Adam's eps in the fallback GPT-2's key biases, whose gradients are zero in exact arithmetic,
# would move by rounding divided by itself.
ALWAYS = {"graft": "none", "momentum": "none", "state_dtype": "float64", "fallback_eps": 1e-4}
# Positions that SENG and the solvers of NG+ keep: of two batches.
KEPT = {"tiny_mlp": 16, "tiny_gpt2_block": 32, "padded_gpt2_block": 32, "tiny_conv_net": 150}

Options = dict[str, Any]
Make = Callable[[], Case]
Batches = Sequence[Any]  # the micro-batches of one step

# Few columns, so that a low rank is one; Brand's form wherever there is a side for it.
_LOW: Options = {"rank": 3, "oversampling": 1}
_BRAND: Options = {**_LOW, "factor_form": "brand", "brand_interval": 1}
_SAMPLES: Options = {"update_interval": 1, "damping": 0.5, "damping_mode": "relative"}
METHODS: dict[str, tuple[str, Options]] = {
    "kfac": ("kfac", {}),
    "rs_kfac": ("rs_kfac", _LOW),
    "sre_kfac": ("sre_kfac", _LOW),
    "b_kfac": ("b_kfac", _BRAND),
    "b_r_kfac": ("b_r_kfac", {**_BRAND, "rsvd_interval": 3}),
    "b_kfac_c": ("b_kfac_c", {**_BRAND, "correction_interval": 3}),
    "seng": ("seng", {**_SAMPLES, "sample_size": None}),
    "ng_plus_per_sample": ("ng_plus_per_sample", _SAMPLES),
    "ng_plus_ema": ("ng_plus", {**_SAMPLES, "curvature": "per_sample_ema", "beta": 0.8}),
    "ng_plus_smw": ("ng_plus_per_sample", {**_SAMPLES, "solver": "smw"}),
    "ng_plus_sketched": (
        "ng_plus",
        {
            **_SAMPLES,
            "curvature": "per_sample",
            "solver": "sketched",
            "sketch_rows": 3,
        },
    ),
}
KFAC = [label for label, (name, _) in METHODS.items() if "kfac" in name]
EVERY_STEP: Options = {"update_interval": 1, "inverse_interval": 1}
BRAND_NAMES = [label for label in KFAC if label.startswith("b_")]
BETWEEN_POSITIONS = ("seng", "ng_plus_smw", "ng_plus_sketched")
ONE_OF_EACH = ("kfac", "b_r_kfac", "seng", "ng_plus_per_sample")
ALL_METHODS = slow_for_relatives(METHODS)


# --- the reference --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LayerReference:
    """One layer of the copy.

    Args:
        joint: whether the bias is a column of the matrix.
        groups: rows and columns of the matrix, and the algorithm for them.
    """

    module: Any
    joint: bool
    groups: list[tuple[Tensor, Tensor, Any]]
    options: Options
    steps: int = 0
    moment: Tensor | float = 0.0
    diagonal: Graft = field(init=False)

    def __post_init__(self) -> None:
        self.diagonal = Graft(kind=self.options["graft"], beta2=self.options["graft_beta2"])

    def direction(self, grad: Tensor, columns: ReferenceColumns, clip: Tensor | float) -> Tensor:
        """Statistics, direction and graft for the gradient [M, B (+ 1)].

        Args:
            clip: what the gradient has been multiplied with, the columns have not.
        """
        self.steps += 1
        self.diagonal.update(grad)
        x = self._first_moment(grad) if self.options["momentum_site"] == "gradient" else grad
        found = torch.zeros_like(grad)
        for rows, places, method in self.groups:
            some = ReferenceColumns(
                inputs=columns.inputs[..., places],
                outputs=columns.outputs[..., rows],
                complete=columns.complete,
            )
            method.update(grad[rows][:, places], some)
            clipped = replace(some, outputs=clip * some.outputs)
            extra = [clipped] if isinstance(method, KfacReference) else []
            found[rows[:, None], places] = method.apply(x[rows][:, places], *extra)
        if self.options["graft"] == "none":
            return found
        return found * (self.diagonal.step(x).norm() / (found.norm() + TINY_NORM))

    def move(self, direction: Tensor, lr: float, decay: float) -> None:
        """First moment of the direction, decoupled decay of the weight alone, step."""
        if self.options["momentum_site"] == "direction":
            direction = self._first_moment(direction)
        weight = direction[:, :-1] if self.joint else direction
        self.module.weight.data.mul_(1 - lr * decay)
        self.module.weight.data -= lr * _as_weight(self.module, weight)
        if self.joint:
            self.module.bias.data -= lr * direction[:, -1]

    def _first_moment(self, x: Tensor) -> Tensor:
        kind, beta = self.options["momentum"], self.options["betas"][0]
        if kind == "none":
            return x
        self.moment = beta * self.moment + (1.0 if kind == "heavy_ball" else 1.0 - beta) * x
        return self.moment if kind == "heavy_ball" else self.moment / (1.0 - beta**self.steps)


class ModelReference:
    """A copy of a model and a reference for each of its layers and other parameters."""

    def __init__(self, model: nn.Module, loss: Loss, optimizer: PreconditionedOptimizer) -> None:
        self.model, self.loss = deepcopy(model), loss
        self.lr = optimizer.param_groups[0]["lr"]
        self.options = optimizer.recipe.hyperparameters()
        own = dict(self.model.named_parameters())
        views = {
            name: [ParamView.from_plain(view) for view in plain]
            for group in optimizer.param_groups
            for name, plain in zip(group["param_names"], group["views"], strict=True)
        }
        self.layers = {
            name: self._layer(optimizer.algorithm_name, module, views[f"{name}.weight"])
            for name, module in self.model.named_modules()
            if views.get(f"{name}.weight")
        }
        layered = {f"{name}.weight" for name in self.layers}
        layered |= {f"{name}.bias" for name, layer in self.layers.items() if layer.joint}
        self.others = {
            name: AdamReference(
                weight=param.detach().clone(),
                lr=self.lr,
                weight_decay=DECAY if param.ndim > 1 else 0.0,
                betas=self.options["betas"],
                eps=self.options["fallback_eps"],
            )
            for name, param in own.items()
            if name not in layered
        }

    def _layer(self, name: str, module: Any, views: list[ParamView]) -> LayerReference:
        shape = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        numbers = torch.arange(module.weight.numel()).view(shape[0], -1)
        outputs, inputs = numbers // numbers.shape[1], numbers % numbers.shape[1]
        found = []
        for view in views:
            rows, places = (view.to_blocks(_as_weight(module, x)) for x in (outputs, inputs))
            found += [(r[:, 0], p[0]) for r, p in zip(rows, places, strict=True)]
        # A bias joins where each output is a row of one group, whose inputs are all of the layer's.
        once = sorted(torch.cat([rows for rows, _ in found]).tolist()) == list(range(shape[0]))
        joint = not name.startswith("ng_plus") and module.bias is not None and once
        if joint:
            one = torch.tensor([numbers.shape[1]])
            found = [(rows, torch.cat([places, one])) for rows, places in found]
        groups = [
            (rows, places, REFERENCES[name].build(self.options, (len(rows), len(places))))
            for rows, places in found
        ]
        return LayerReference(module=module, joint=joint, groups=groups, options=self.options)

    def step(self, batches: Batches, max_norm: float | None = None) -> None:
        """One step on the mean loss of some micro-batches."""
        records = capture(self.model, self.loss, batches)
        self.model.zero_grad()
        (sum(self.loss(self.model, batch) for batch in batches) / len(batches)).backward()
        clip: Tensor | float = 1.0
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = {name: self._matrix_gradient(layer) for name, layer in self.layers.items()}
        directions = {
            name: layer.direction(grads[name], self._columns(records[name], layer, batches), clip)
            for name, layer in self.layers.items()
        }
        for name, factor in self._clip(directions, grads).items():
            self.layers[name].move(factor * directions[name], self.lr, DECAY)
        own = dict(self.model.named_parameters())
        for name, reference in self.others.items():
            reference.step(own[name].grad)
            own[name].data.copy_(reference.weight)

    def _matrix_gradient(self, layer: LayerReference) -> Tensor:
        grad = layer.module.weight.grad
        grad = grad.T if isinstance(layer.module, Conv1D) else grad.flatten(1)
        return torch.cat([grad, layer.module.bias.grad[:, None]], 1) if layer.joint else grad

    def _columns(
        self, record: LayerRecord, layer: LayerReference, batches: Batches
    ) -> ReferenceColumns:
        """Drawn without replacement where there are more than ``max_columns``."""
        valid = None
        if isinstance(batches[0], dict) and "attention_mask" in batches[0]:
            valid = torch.cat([batch["attention_mask"] for batch in batches]) == 1
        if self.options.get("weight_sharing") == "reduce":
            return record.reduced_columns(valid)
        columns = record.columns(valid)
        size = self.options["max_columns"]
        if size is None or columns.count <= size:
            return columns
        assert valid is None, "draws among padded positions are tested elsewhere"
        if layer_takes_samples(self.options):
            units = size // columns.inputs.shape[1]
        else:
            columns, units = columns.positions_as_samples(), size
        seed = self.options["seed"] + 1_000_003 * (layer.steps + 1)
        generator = torch.Generator().manual_seed(seed)
        count = len(columns.inputs)
        if self.options.get("application") == "linear":  # all are captured, some drawn of them
            kept = torch.randperm(count, generator=generator)[:units]
        else:
            keys = torch.rand(count, generator=generator, dtype=torch.float64)
            kept = keys.argsort()[:units]
        share = count / units
        return ReferenceColumns(
            inputs=columns.inputs[kept] * share**0.5,
            outputs=columns.outputs[kept] * share**0.5,
            complete=False,
        )

    def _clip(
        self, directions: dict[str, Tensor], grads: dict[str, Tensor]
    ) -> dict[str, Tensor | float]:
        """What each layer's direction is multiplied with."""
        mode, limit = self.options["clip_mode"], self.options["clip_value"]
        if mode == "update_rms":
            limit = 0.07 if limit is None else limit
            roots = {name: d.square().mean().sqrt() for name, d in directions.items()}
            return {name: min(1.0, limit / rms) for name, rms in roots.items()}
        if mode == "kl":
            limit = 1e-3 if limit is None else limit
            change = self.lr**2 * sum((d * grads[name]).sum() for name, d in directions.items())
            return dict.fromkeys(directions, min(1.0, (limit / change) ** 0.5))
        return dict.fromkeys(directions, 1.0)


def layer_takes_samples(options: Options) -> bool:
    """Whether whole samples are drawn: SENG and NG+, not its solvers between positions."""
    return "factor_decay" not in options and options.get("solver", "inverse") == "inverse"


def _as_weight(module: Any, matrix: Tensor) -> Tensor:
    """A matrix [M, B] in the shape of the layer's weight."""
    return matrix.T if isinstance(module, Conv1D) else matrix.reshape(module.weight.shape)


# --- running both ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Outcome:
    """What a comparison came by, for tests that must not pass without having met it."""

    optimizer: PreconditionedOptimizer
    reference: ModelReference
    clipped: list[float] = field(default_factory=list)


def options_of(label: str, **options: Any) -> tuple[str, Options]:
    """Name and options of a method; its own before the general ones."""
    name, own = METHODS[label]
    general = EVERY_STEP if label in KFAC else {}
    return name, {**ALWAYS, **general, **own, **options}


def train(
    optimizer: PreconditionedOptimizer,
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    max_norm: float | None = None,
) -> None:
    """One step of the optimizer, as a training loop takes it."""
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()


def compare(
    make: Make,
    label: str,
    *,
    micro_batches: int = 1,
    lr: float = LR,
    max_norm: float | None = None,
    by_optimizer: bool = False,
    split: bool = True,
    **options: Any,
) -> Outcome:
    """Trains a model with the optimizer and its copy with the reference: the same weights.

    Args:
        max_norm: of the gradient, clipped between backward pass and step.
        by_optimizer: whether the optimizer itself clips.
        split: queries, keys and values as matrices of their own.
    """
    model, loss, batches = make()
    if label in BETWEEN_POSITIONS:
        options = {"max_columns": KEPT[make.__name__], **options}
    if by_optimizer:
        options["max_grad_norm"] = max_norm
    name, settings = options_of(label, **options)
    if split and isinstance(model, GPT2LMHeadModel):
        grouping = options.get("attention_grouping", "kernel")
        settings["rules"] = view_rules(model, attention_grouping=grouping)
    optimizer = create_optimizer(model, name, lr=lr, weight_decay=DECAY, **settings)
    reference = ModelReference(model, loss, optimizer)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    clipped = []
    for step in range(STEPS):
        parts = [batches[(step + i) % len(batches)] for i in range(micro_batches)]
        train(optimizer, model, loss, parts, None if by_optimizer else max_norm)
        reference.step(parts, max_norm)
        clipped.append(optimizer.health().get("clip_factor", 1.0))
        own, expected = dict(model.named_parameters()), dict(reference.model.named_parameters())
        for key in own:
            assert_same([own[key]], [expected[key]], TOLERANCE, f"step {step + 1}, {key}")
    for key, param in model.named_parameters():
        assert (param - before[key]).abs().max() > 1e-6, f"{key} did not move"
    return Outcome(optimizer=optimizer, reference=reference, clipped=clipped)


# --- models ---------------------------------------------------------------------------------------


def wide_mlp() -> Case:
    """Layers much wider than the batch: 40 and 30 with batches of four."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
        batches = [
            (torch.randn(4, 40, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(5)
        ]
    return model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches


def padded_gpt2_block() -> Case:
    """The GPT-2 block on sequences of 5, 3 and 4 tokens, some padded on the left."""
    model, _, batches = tiny_gpt2_block()
    masks = [
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]),
    ]
    padded = [{**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]
    return model, _masked_next_token, padded


def _masked_next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Over the tokens after which another one comes."""
    tokens, mask = batch["input_ids"], batch["attention_mask"] == 1
    logits = model(**batch, use_cache=False).logits[:, :-1]
    counted = mask[:, 1:] & mask[:, :-1]
    return F.cross_entropy(logits[counted], tokens[:, 1:][counted])


# --- every method on every model ------------------------------------------------------------------


def _on(every: Make, *some: Make) -> list[Any]:
    """All methods on one model (relatives: slow), one of each family on others."""
    return [
        *(pytest.param(*case.values, every, marks=case.marks) for case in ALL_METHODS),
        *((label, make) for make in some for label in ONE_OF_EACH),
    ]


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("label", METHODS)
def test_agrees_on_every_model(label: str, make: Make) -> None:
    outcome = compare(make, label)
    joint = [layer.joint for layer in outcome.reference.layers.values()]
    assert len(joint) >= 2
    assert any(joint) != label.startswith("ng_plus")


_INTERVALS: dict[str, Options] = {
    "kfac": {"update_interval": 2, "inverse_interval": 3},
    "rs_kfac": {"update_interval": 2, "inverse_interval": 3},
    "sre_kfac": {"update_interval": 2, "inverse_interval": 3},
    "b_kfac": {"update_interval": 3, "brand_interval": 2},
    "b_r_kfac": {"update_interval": 2, "brand_interval": 2, "rsvd_interval": 3},
    "b_kfac_c": {"update_interval": 2, "brand_interval": 3, "correction_interval": 2},
}


@pytest.mark.parametrize("label", ALL_METHODS)
def test_agrees_with_intervals(label: str) -> None:
    compare(tiny_gpt2_block, label, **_INTERVALS.get(label, {"update_interval": 3}))


@pytest.mark.parametrize(("label", "make"), _on(tiny_gpt2_block, tiny_conv_net))
def test_agrees_over_micro_batches(label: str, make: Make) -> None:
    compare(make, label, micro_batches=2)


@pytest.mark.parametrize(("label", "make"), _on(tiny_mlp, tiny_gpt2_block))
def test_agrees_under_the_registered_stages(label: str, make: Make) -> None:
    """Steps of Adam's length, on the momentum of the gradient."""
    compare(make, label, graft="adam", momentum="ema", momentum_site="gradient")


@pytest.mark.parametrize("label", ALL_METHODS)
def test_agrees_under_heavy_ball(label: str) -> None:
    compare(tiny_mlp, label, momentum="heavy_ball", momentum_site="direction")


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ALL_METHODS)
def test_agrees_on_padded_sequences(label: str) -> None:
    compare(padded_gpt2_block, label, micro_batches=2)


@pytest.mark.parametrize("make", [padded_gpt2_block, tiny_conv_net])
@pytest.mark.parametrize("label", KFAC)
def test_agrees_with_one_column_per_sample(label: str, make: Make) -> None:
    """On queries, keys and values in one kernel: see the next test."""
    compare(make, label, lr=LR / 10, weight_sharing="reduce", micro_batches=2, split=False)


@pytest.mark.parametrize("label", ["kfac", "rs_kfac", "b_kfac"])
def test_factors_that_are_zero_but_for_rounding_are_none(label: str) -> None:
    """A key bias moves no attention: summed over a sample, the gradients of its keys are zero.

    What is left of them is rounding, no factor to divide by.
    """
    model, loss, batches = tiny_gpt2_block()
    name, options = options_of(label, weight_sharing="reduce")
    optimizer = create_optimizer(model, name, lr=LR, rules=view_rules(model), **options)
    before = [param.detach().clone() for param in model.parameters()]
    train(optimizer, model, loss, batches[:1])
    moved = max((a - b).norm() for a, b in zip(model.parameters(), before, strict=True))
    assert moved < 1e3


@pytest.mark.parametrize("label", ALL_METHODS)
def test_agrees_by_head(label: str) -> None:
    """Two heads of four rows of q, k and v, and of four columns of the output."""
    outcome = compare(tiny_gpt2_block, label, attention_grouping="head")
    layers = outcome.reference.layers
    assert len(layers["transformer.h.0.attn.c_attn"].groups) == 6
    output = layers["transformer.h.0.attn.c_proj"]
    assert len(output.groups) == 2
    assert not output.joint


@pytest.mark.parametrize(("label", "make"), _on(tiny_gpt2_block, tiny_conv_net))
def test_agrees_with_drawn_columns(label: str, make: Make) -> None:
    """Seven of 15 positions, or two of three samples."""
    by_sample = label in ("seng", "ng_plus_per_sample", "ng_plus_ema")
    conv = make is tiny_conv_net
    compare(make, label, max_columns=(50 if conv else 10) if by_sample else 7)


# --- options --------------------------------------------------------------------------------------

_VARIANTS: dict[str, tuple[str, Options]] = {
    "kfac_authors_code": ("kfac", {"authors_code": True}),
    "kfac_damping_schedule": ("kfac", {"damping": "0.1/0.5@step4"}),
    "rs_kfac_authors_code": ("rs_kfac", {"authors_code": True, "rank": 4, "rank_step": 1}),
    "sre_kfac_authors_code": ("sre_kfac", {"authors_code": True, "rank": 4, "rank_step": 1}),
    "rs_kfac_without_continuation": ("rs_kfac", {"continuation": False, "damping": 1.0}),
    "rs_kfac_rank_schedule": ("rs_kfac", {"rank": "4/2@step4", "oversampling": "0/1@step3"}),
    "b_kfac_authors_code": ("b_kfac", {"authors_code": True, "rank": 4, "rank_step": 1}),
    "b_kfac_without_continuation": ("b_kfac", {"continuation": False}),
    "b_r_kfac_authors_code": ("b_r_kfac", {"authors_code": True, "rank": 4, "rank_step": 1}),
    "b_r_kfac_overwrite_factor": ("b_r_kfac", {"overwrite": "factor"}),
    "b_kfac_c_authors_code": ("b_kfac_c", {"authors_code": True, "rank": 4, "rank_step": 1}),
    "b_kfac_c_all_corrected": ("b_kfac_c", {"correction_share": 1.0}),
    "b_kfac_rsvd_form": ("b_kfac", {"factor_form": "rsvd"}),
    "seng_drawn_rows": ("seng", {"sample_size": 3}),
    "seng_absolute": ("seng", {"damping": 2.0, "damping_mode": "absolute"}),
    "per_sample_absolute": (
        "ng_plus_per_sample",
        {"damping": 0.3, "damping_mode": "absolute"},
    ),
    "per_sample_authors_code": ("ng_plus_per_sample", {"authors_code": True}),
    "ema_authors_code": ("ng_plus_ema", {"authors_code": True}),
    "smw_authors_code": ("ng_plus_smw", {"authors_code": True}),
    "per_sample_blocks": ("ng_plus_per_sample", {"block_size": 3}),
    "ema_blocks": ("ng_plus_ema", {"block_size": 3}),
    "per_sample_sketch": ("ng_plus_per_sample", {"sketch_size": 3}),
}


@pytest.mark.parametrize("make", [tiny_mlp, pytest.param(tiny_gpt2_block, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", _VARIANTS)
def test_agrees_under_its_own_options(variant: str, make: Make) -> None:
    label, options = _VARIANTS[variant]
    compare(make, label, **options)


# --- clips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "make"), _on(tiny_mlp, tiny_gpt2_block))
@pytest.mark.parametrize("mode", ["update_rms", "kl"])
def test_agrees_when_clipped(mode: str, label: str, make: Make) -> None:
    """Each layer with its bias by the root mean square, all layers by one bound."""
    limit = {"update_rms": 0.05, "kl": 0.1 * LR**2}[mode]
    outcome = compare(make, label, clip_mode=mode, clip_value=limit, momentum="heavy_ball")
    assert min(outcome.clipped) < 0.99, "nothing was clipped"


@pytest.mark.parametrize("mode", ["update_rms", "kl"])
def test_agrees_with_the_usual_limits(mode: str) -> None:
    outcome = compare(tiny_mlp, "kfac", lr=1e-2, clip_mode=mode, damping=0.01)
    assert min(outcome.clipped) < 0.99, "nothing was clipped"


def test_agrees_when_clipped_after_grafting() -> None:
    outcome = compare(tiny_mlp, "kfac", clip_mode="update_rms", clip_value=0.5, graft="adam")
    assert min(outcome.clipped) < 0.99, "nothing was clipped"


# --- Brand's form on layers wider than the batch --------------------------------------------------

_WIDE: Options = {"factor_form": "auto", "max_columns": 8}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("options", [{}, {"authors_code": True, "rank_step": 1}], ids=str)
@pytest.mark.parametrize("label", BRAND_NAMES)
def test_agrees_on_wide_layers(label: str, options: Options, micro_batches: int) -> None:
    outcome = compare(wide_mlp, label, micro_batches=micro_batches, **_WIDE, **options)
    sides = {
        side.size: side.brand
        for layer in outcome.reference.layers.values()
        for _, _, method in layer.groups
        for side in (method.input_side, method.output_side)
    }
    assert sides == {41: True, 30: True, 31: True, 3: False}


@pytest.mark.parametrize("label", BRAND_NAMES)
def test_agrees_on_wide_layers_with_intervals(label: str) -> None:
    compare(wide_mlp, label, **_WIDE, **_INTERVALS[label])


@pytest.mark.parametrize("make", [wide_mlp, tiny_gpt2_block, tiny_mlp])
@pytest.mark.parametrize("label", BRAND_NAMES)
def test_linear_application_agrees(label: str, make: Make) -> None:
    compare(make, label, application="linear", max_columns=64)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("label", BRAND_NAMES)
def test_linear_application_is_the_plain_one(
    label: str, micro_batches: int, max_norm: float | None
) -> None:
    """Also where the gradient is clipped before the step, which the columns do not know."""
    trained = []
    for application in ("plain", "linear"):
        model, loss, batches = wide_mlp()
        name, options = options_of(label, application=application, **_WIDE, brand_interval=3)
        optimizer = create_optimizer(model, name, lr=LR, **options)
        for step in range(STEPS):
            parts = [batches[(step + i) % len(batches)] for i in range(micro_batches)]
            train(optimizer, model, loss, parts, max_norm)
        trained.append([param.detach() for param in model.parameters()])
    assert_same(trained[1], trained[0], TOLERANCE)


@pytest.mark.parametrize("label", BRAND_NAMES)
def test_linear_application_agrees_where_statistics_draw(label: str) -> None:
    """The step from all columns, the forms from two of four or of eight."""
    options = {**_WIDE, "max_columns": 2, "application": "linear"}
    compare(wide_mlp, label, **options)
    compare(wide_mlp, label, micro_batches=2, **options)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("label", BRAND_NAMES)
def test_linear_application_agrees_without_gradients(label: str, max_norm: float | None) -> None:
    """The second layer's weight has none; the norm of all is what it would be with it."""
    options = {**_WIDE, "application": "linear", "form_gradient": False}
    compare(wide_mlp, label, micro_batches=2, max_norm=max_norm, by_optimizer=True, **options)


def test_one_column_per_sample_is_not_the_gradient() -> None:
    """The product of mean inputs and summed output gradients: the plain application then."""
    trained = []
    for chosen in ({}, {"application": "linear"}):
        model, loss, batches = tiny_gpt2_block()
        name, settings = options_of("b_kfac", weight_sharing="reduce", **chosen)
        optimizer = create_optimizer(model, name, lr=LR, **settings)
        for step in range(STEPS):
            train(optimizer, model, loss, [batches[step % 3]])
        trained.append([param.detach() for param in model.parameters()])
    assert_same(trained[1], trained[0], TOLERANCE)


@pytest.mark.parametrize("max_norm", [0.05])
@pytest.mark.parametrize("label", METHODS)
def test_agrees_with_clipped_gradients(label: str, max_norm: float) -> None:
    """Statistics are those of the gradient before it was clipped."""
    compare(tiny_mlp, label, max_norm=max_norm)
