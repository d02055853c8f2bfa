"""Groups, names, views and hyperparameters that reach the optimizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

import trainer_ext
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import option_specs
from tests.trainer_ext.tiny import NAME, arguments, tiny_gpt2, token_blocks, trainer
from trainer_ext import build


def views_by_name(optimizer: PreconditionedOptimizer) -> dict[str, list[Any]]:
    return {
        name: views
        for group in optimizer.param_groups
        for name, views in zip(group["param_names"], group["views"], strict=True)
    }


def test_groups_are_the_trainers_groups(tmp_path: Path) -> None:
    stock = trainer(tmp_path, optim="adamw_torch", optim_args=None, weight_decay=0.1)
    ours = trainer(tmp_path, weight_decay=0.1)
    expected, found = stock.create_optimizer().param_groups, ours.create_optimizer().param_groups
    assert [group["weight_decay"] for group in found] == [0.1, 0.0]
    for one, two in zip(expected, found, strict=True):
        assert one["weight_decay"] == two["weight_decay"]
        assert [p.shape for p in one["params"]] == [p.shape for p in two["params"]]
        named = dict(ours.model.named_parameters())
        for name, param, _ in zip(two["param_names"], two["params"], two["views"], strict=True):
            assert named[name] is param
    without = found[1]["param_names"]
    assert all(name.endswith("bias") or "ln_" in name for name in without)
    assert "transformer.wte.weight" in found[0]["param_names"]


def test_no_decay_group_is_not_decayed(tmp_path: Path) -> None:
    decayed, kept = trainer(tmp_path, learning_rate=0.1, weight_decay=0.5), tiny_gpt2()
    optimizer = decayed.create_optimizer()
    for param in decayed.model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    with_decay = set(decayed.get_decay_parameter_names(decayed.model))
    for (name, after), before in zip(
        decayed.model.named_parameters(), kept.parameters(), strict=True
    ):
        factor = 1 - 0.1 * 0.5 if name in with_decay else 1.0
        torch.testing.assert_close(after, before * factor)


def test_override_of_the_decay_names_is_respected(tmp_path: Path) -> None:
    class NoDecay(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return ["transformer.wte.weight"]

    first, _ = trainer(tmp_path, kind=NoDecay, weight_decay=0.1).create_optimizer().param_groups
    assert first["param_names"] == ["transformer.wte.weight"]


def test_groups_of_the_users_own(tmp_path: Path) -> None:
    model = tiny_gpt2()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), model)
    slow, fast = (
        list(model.transformer.h[0].parameters()),
        list(model.transformer.h[1].parameters()),
    )
    optimizer = cls([{"params": slow, "lr": 1e-4}, {"params": fast}], **kwargs)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-2]
    assert optimizer.param_names[0] == "transformer.h.0.ln_1.weight"
    assert views_by_name(optimizer)["transformer.h.1.attn.c_attn.weight"]
    assert cls(model.parameters(), **kwargs).param_names[0] == "transformer.wte.weight"
    with pytest.raises(
        ValueError, match="1 parameters in the groups are not parameters of the mod"
    ):
        cls([nn.Parameter(torch.zeros(2))], **kwargs)


def test_training_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "learning_rate": 0.02}
    optimizer = trainer(tmp_path, **changes).create_optimizer()
    assert optimizer.recipe.betas == (0.8, 0.95)
    assert optimizer.recipe.fallback.fallback_eps == 1e-5
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.recipe.algorithm.rank == 4


def test_optim_args_win_over_the_adam_fields(tmp_path: Path) -> None:
    changes = {"adam_beta1": 0.8, "adam_epsilon": 1e-5}
    given = "betas=0.7/0.9,fallback_eps=1e-4"
    recipe = trainer(tmp_path, optim_args=given, **changes).create_optimizer().recipe
    assert recipe.betas == (0.7, 0.9)
    assert recipe.fallback.fallback_eps == 1e-4


def test_untouched_adam_fields_leave_the_optimizers_defaults(tmp_path: Path) -> None:
    options = build.options_from(arguments(tmp_path), NAME)
    assert options["betas"] == option_specs(NAME)["betas"].default


@pytest.mark.parametrize("targets", [r".*h\.0\.attn\..*", ["h.0.attn"]])
def test_only_target_modules_are_preconditioned(targets: Any, tmp_path: Path) -> None:
    views = views_by_name(trainer(tmp_path, optim_target_modules=targets).create_optimizer())
    assert {name for name, found in views.items() if found} == {
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
    }


def test_all_linear_is_every_linear_layer(tmp_path: Path) -> None:
    everything = views_by_name(trainer(tmp_path).create_optimizer())
    linear = trainer(tmp_path, optim_target_modules="all-linear").create_optimizer()
    assert views_by_name(linear) == everything


def test_target_modules_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim_target_modules = 'q_proj' matches no layer"):
        trainer(tmp_path, optim_target_modules="q_proj").create_optimizer()


def test_frozen_parameters_stay_out(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.transformer.wte.requires_grad_(False)
    assert "transformer.wte.weight" not in trainer(tmp_path, model).create_optimizer().param_names


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path))


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_freed_memory_is_kept_on_cpus(
    device: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(build, "keep_freed_memory", lambda: calls.append("kept"))
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "device", torch.device(device))
    build.optimizer_cls_and_kwargs(args, tiny_gpt2())
    assert len(calls) == times


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"DeepSpeed hands the optimizer flat .* FSDP version 2"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())


def test_flat_parameters_are_refused() -> None:
    # Wrapping for real needs a process group; the check looks at the names of classes.
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(ValueError, match="FSDP version 1 hands the optimizer flat"):
        trainer_ext.build_optimizer(wrapper(tiny_gpt2()), NAME, lr=1e-3)


def test_factory_in_the_trainer(tmp_path: Path) -> None:
    factory = trainer_ext.OptimizerFactory("shared_basis_adam", rank=2, weight_decay=0.1)
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    run = Trainer(
        tiny_gpt2(),
        args,
        train_dataset=token_blocks(),
        optimizer_cls_and_kwargs=(factory, {"lr": 1e-3}),
    )
    run.train()
    optimizer = run.optimizer.optimizer
    assert optimizer.algorithm_name == "shared_basis_adam"
    assert optimizer.recipe.algorithm.rank == 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (tmp_path / "checkpoint-3" / "optimizer.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs lr"),
        ({"lr": -1.0}, "lr = -1.0 is not allowed"),
        ({"lr": 1e-3, "rnak": 1}, "no option 'rnak'"),
        ({"lr": 1e-3, "weight_decay": -1.0}, "weight_decay = -1.0 is not allowed"),
    ],
)
def test_factory_with_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_ext.OptimizerFactory(NAME, **options)()(tiny_gpt2())


def test_explained_groups_are_the_built_groups() -> None:
    model = tiny_gpt2()
    rows = {row.parameter: row for row in trainer_ext.explain_groups(model, NAME, rank=4)}
    optimizer = trainer_ext.build_optimizer(model, NAME, lr=1e-3, rank=4)
    for name, views in views_by_name(optimizer).items():
        assert rows[name].algorithm == (NAME if views else "adam")
    # Per head, the query kernel of each of the two heads is a group of its own.
    assert rows["transformer.h.0.attn.c_attn.weight"].view.startswith("q: 2 x [8, 16]")


def test_plan_line_counts_everything() -> None:
    model = tiny_gpt2()
    line = build.plan_line(trainer_ext.build_optimizer(model, NAME, lr=1e-3, rank=4))
    others = sum(param.numel() for param in model.parameters()) - 6144
    assert line.startswith(f"{NAME}: {NAME} 6,144 parameters in 8 tensors, ")
    assert f"; adam {others:,} parameters in 20 tensors, " in line
