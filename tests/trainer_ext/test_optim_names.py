"""Registration: real enum members, handlers and behaviours, all of it reversible."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    trainer,
    trainer_optimizer,
    training_args,
)

import trainer_ext
from hf_precond.registry import list_optimizers
from tests.trainer_ext.tiny import NAME, arguments
from trainer_ext import optim_names, served

LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["trainer_ext"] = sys.modules["hf_precond"] = None
import torch
args = torch.load(sys.argv[1], weights_only=False)
print(type(args.optim).__name__, args.optim, type(args).__name__)
"""


def snapshot() -> dict[str, Any]:
    """Everything of transformers that registration may change."""
    names = training_args.OptimizerNames
    methods = ("log", "create_model_card", "get_optimizer_cls_and_kwargs")
    private = ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler")
    return {
        "members": list(names),
        "map": dict(names._member_map_),
        "values": dict(names._value2member_map_),
        "attributes": sorted(vars(names)),
        "handlers": dict(trainer_optimizer._OPTIMIZER_HANDLERS),
        "callbacks": list(trainer.DEFAULT_CALLBACKS),
        "methods": {name: Trainer.__dict__[name] for name in methods + private},
    }


def test_unregister_takes_everything_back() -> None:
    trainer_ext.unregister()
    before = snapshot()
    trainer_ext.register()
    during = snapshot()
    trainer_ext.unregister()
    assert snapshot() == before
    assert all(during[part] != before[part] for part in before)


def test_unregistered_name_is_refused(tmp_path: Path) -> None:
    trainer_ext.unregister()
    with pytest.raises(ValueError, match="not a valid OptimizerNames"):
        arguments(tmp_path)


def test_register_is_idempotent() -> None:
    once = snapshot()
    trainer_ext.register()
    assert snapshot() == once


@pytest.mark.parametrize("name", list_optimizers())
def test_name_is_a_member_and_a_command_line_choice(name: str, tmp_path: Path) -> None:
    names = training_args.OptimizerNames
    member = names(name)
    assert member in list(names)
    assert getattr(names, name.upper()) is member is names[name.upper()]
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
    assert args.optim is member
    assert args.to_dict()["optim"] == name


def test_member_pickles_as_plain_str_and_copies_as_itself() -> None:
    member = training_args.OptimizerNames(NAME)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(member, protocol))) is str
    assert copy.deepcopy(member) is member


def test_training_args_bin_loads_without_the_package(tmp_path: Path) -> None:
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path / "training_args.bin")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.split() == ["str", NAME, "TrainingArguments"], done.stderr


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (training_args, "OptimizerNames"),
        (trainer_optimizer, "_OPTIMIZER_HANDLERS"),
        (trainer_optimizer, "OptimizerContext"),
        (trainer, "DEFAULT_CALLBACKS"),
        (Trainer, "get_optimizer_cls_and_kwargs"),
        (Trainer, "get_decay_parameter_names"),
        (Trainer, "log"),
        (Trainer, "create_model_card"),
        (Trainer, "_save_optimizer_and_scheduler"),
        (Trainer, "_load_optimizer_and_scheduler"),
    ],
)
def test_another_layout_of_transformers_is_named(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_ext.unregister()
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with pytest.raises(optim_names.TransformersLayoutError, match=name):
            trainer_ext.register()
    before = snapshot()
    trainer_ext.register()
    trainer_ext.unregister()
    assert snapshot() == before


def test_a_failure_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_ext.unregister()
    before = snapshot()

    def fail() -> None:
        raise optim_names.TransformersLayoutError("no")

    monkeypatch.setattr(optim_names, "_self_test", fail)
    with pytest.raises(optim_names.TransformersLayoutError):
        trainer_ext.register()
    assert snapshot() == before


def test_handler_in_the_dict_builds_our_class(tmp_path: Path) -> None:
    from tests.trainer_ext.tiny import tiny_gpt2

    args = arguments(tmp_path)
    context = trainer_optimizer.OptimizerContext(
        args=args, model=tiny_gpt2(), optimizer_kwargs={}, adam_kwargs={}, optim_args={}
    )
    built, kwargs = trainer_optimizer._OPTIMIZER_HANDLERS[args.optim](context)
    assert issubclass(built, trainer_ext.build.PreconditionedOptimizer)
    assert kwargs["lr"] == args.learning_rate


def test_optim_args_of_other_optimizers_go_the_stock_way(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="rmsprop", optim_args="momentum=0.5, alpha=0.9")
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, None)
    assert kwargs["momentum"] == 0.5
    args.optim_args = "momentum=0.5,"
    with pytest.raises(ValueError, match="not enough values to unpack"):
        Trainer.get_optimizer_cls_and_kwargs(args, None)


@pytest.fixture
def soap_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this transformers release had an optimizer called soap."""
    trainer_ext.unregister()
    monkeypatch.setattr(served, "STOCK_NAMES", served.STOCK_NAMES | {"soap"})


@pytest.mark.usefixtures("soap_is_taken")
def test_a_name_that_transformers_has_is_left_to_it(
    logs: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trainer_ext.register()
    assert "soap" in logs.text
    assert "OptimizerFactory('soap')" in logs.text
    values = [member.value for member in training_args.OptimizerNames]
    assert "soap" not in values  # not added by us
    assert set(list_optimizers()) - {"soap"} <= set(values)
    args = arguments(tmp_path)
    args.optim = "soap"
    with pytest.raises(ValueError, match="soap"):  # the stock Trainer's answer to an unknown name
        Trainer.get_optimizer_cls_and_kwargs(args, None)
    trainer_ext.unregister()


def test_no_name_is_taken_in_this_release() -> None:
    assert served.served_names() == list_optimizers()
