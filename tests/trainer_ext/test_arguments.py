"""``optim_args``: what is understood, and the message of everything that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_precond.registry import list_optimizers, option_specs, resolve
from tests.trainer_ext.tiny import NAME, arguments, tiny_gpt2
from trainer_ext.arguments import as_text, parse_optim_args
from trainer_ext.build import optimizer_cls_and_kwargs

# optim_args -> what the message must say, all of it in one ValueError.
MALFORMED = {
    "rank": "'rank' is not KEY=VALUE",
    "a=b=c": "'a=b=c' has more than one '='",
    "=4": "'=4' has no key before '='",
    "rank=": "'rank' has no value after '='",
    "rank=4,,eps=1": "an empty part between two commas",
    ",rank=4": "an empty part between two commas",
    "rank=4,rank=8": "'rank' is given twice",
    "betas=(0.9,0.95)": r"'0.95\)' is not KEY=VALUE \(lists are .* slashes.*'\(0.9' is not",
    "rnak=4": r"unknown option 'rnak' \(nearest: 'rank'\)",
    "update_intervall=4": r"unknown option 'update_intervall' \(nearest: 'update_interval'\)",
    "strict_resum=1": r"unknown option 'strict_resum' \(nearest: 'strict_resume'\)",
    "qqqqqq=4": "unknown option 'qqqqqq'. Valid options: rank, .*strict_resume, config",
    "rank=4,qqqqqq=1,packed=maybe": "unknown option 'qqqqqq'; packed = 'maybe' is not allowed",
    "lr=0.1": r"unknown option 'lr' \(use --learning_rate\)",
    "weight_decay=0.1": r"unknown option 'weight_decay' \(use --weight_decay\)",
    "beta2=0.9": r"unknown option 'beta2' \(use --adam_beta2\)",
    "rank=four": "rank = 'four' is not allowed: it must be an integer >= 1",
    "rank=4.0": "rank = '4.0' is not allowed: it must be an integer >= 1",
    "rank=true": "rank = 'true' is not allowed: it must be an integer",
    "rank=none": "rank = 'none' is not allowed: it must be an integer",
    "coef_interval=half": "coef_interval = 'half' .* an integer >= 1 or none",
    "eps=small": "eps = 'small' is not allowed: it must be a finite number > 0",
    "eps=nan": "eps = 'nan' is not allowed: it must be a finite number > 0",
    "eps=inf": "eps = 'inf' is not allowed: it must be a finite number > 0",
    "warm_start=2": "warm_start = '2' is not allowed: it must be true or false",
    "strict_resume=on": "strict_resume = 'on' is not allowed: it must be true or false",
    "betas=0.9/x": "betas = '0.9/x' is not allowed: it must be numbers separated by slashes",
    "config=missing.yaml": "config file 'missing.yaml' does not exist",
    "rank,config=no.yaml": r"'rank' is not KEY.*; config file 'no.yaml' does not exist\. Valid",
}
# The value is of the right type, but outside its range: found where the optimizer is built.
OUT_OF_RANGE = {
    "rank=0": "rank = 0 .* >= 1",
    "rank=-3": "rank = -3 .* >= 1",
    "num_iters=0": "num_iters = 0 .* >= 1",
    "oversample=-1": "oversample = -1 .* >= 0",
    "update_interval=0": "update_interval = 0 .* >= 1",
    "coef_interval=0": "coef_interval = 0 .* >= 1",
    "max_rank_ratio=0": "max_rank_ratio = 0.0 .* > 0",
    "eps=0": "eps = 0.0 .* > 0",
    "eps=-1e-8": "eps = -1e-08 .* > 0",
    "seed=-1": "seed = -1 .* >= 0",
    "escaped_norm=frobenius": "escaped_norm = 'frobenius' .* one of 'block', 'exact', 'mean'",
    "attention_grouping=layer": "attention_grouping = 'layer' .* one of 'head', 'kernel'",
    "fallback=lion": "fallback = 'lion' .* one of 'adam', 'sgd'",
    "fallback_eps=-1": "fallback_eps = -1.0 .* >= 0",
    "fallback_momentum=1": "fallback_momentum = 1.0 .* < 1",
    "fallback_lr_ratio=0": "fallback_lr_ratio = 0.0 .* > 0",
    "state_dtype=int8": "state_dtype = 'int8' .* one of 'float32'",
    "graft=none_such": "graft = 'none_such' .* one of",
    "momentum_site=weights": "momentum_site = 'weights' .* one of",
    "betas=0.9": r"betas = \(0.9,\) .* two numbers",
    "betas=0.9/0.99/0.999": r"betas = \(0.9, 0.99, 0.999\) .* two numbers",
    "betas=0.9/1.0": r"betas = \(0.9, 1.0\) .* < 1",
    "betas=-0.1/0.9": r"betas = \(-0.1, 0.9\) .* >= 0",
    "max_failures=0": "max_failures = 0 .* >= 1",
    "bucket_size=0": "bucket_size = 0 .* >= 1",
}
GOOD = {
    "": {},
    "rank=8": {"rank": 8},
    " rank = 8 , eps = 1e-6 ": {"rank": 8, "eps": 1e-6},
    "rank=8,": {"rank": 8},
    "betas=0.9/0.95": {"betas": (0.9, 0.95)},
    "warm_start=FALSE,deflate=0,packed=yes": {
        "warm_start": False,
        "deflate": False,
        "packed": True,
    },
    "coef_interval=none,root_interval=2": {"coef_interval": None, "root_interval": 2},
    "escaped_norm=exact": {"escaped_norm": "exact"},
}


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_good_text(text: str, expected: dict[str, object]) -> None:
    assert parse_optim_args(NAME, text).options == expected


@pytest.mark.parametrize(("text", "message"), MALFORMED.items())
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_optim_args(NAME, text)


@pytest.mark.parametrize(("text", "message"), (MALFORMED | OUT_OF_RANGE).items())
def test_wrong_option_stops_the_trainer(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_cls_and_kwargs(arguments(tmp_path, optim_args=text), tiny_gpt2())


def test_strict_resume_is_no_option_of_the_optimizer() -> None:
    parsed = parse_optim_args(NAME, "strict_resume=true,rank=2")
    assert parsed.strict_resume is True
    assert parsed.options == {"rank": 2}
    assert parse_optim_args(NAME, None).strict_resume is False


@pytest.mark.parametrize("name", list_optimizers())
def test_every_default_survives_the_notation(name: str) -> None:
    text = ",".join(f"{spec.name}={as_text(spec.default)}" for spec in option_specs(name).values())
    assert resolve(name, parse_optim_args(name, text).options) == resolve(name)


def test_typed_options_join_the_text() -> None:
    options = {"betas": [0.8, 0.9], "packed": True, "coef_interval": None, "eps": 1e-7}
    parsed = parse_optim_args(NAME, "rank=2", options)
    assert parsed.options == {
        "rank": 2,
        "betas": (0.8, 0.9),
        "packed": True,
        "coef_interval": None,
        "eps": 1e-7,
    }
    with pytest.raises(ValueError, match="'rank' is given twice"):
        parse_optim_args(NAME, "rank=2", {"rank": 2})


def test_config_file_is_overridden_by_the_text(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("rank: 8\neps: 1e-6\nbetas: [0.8, 0.9]\npacked: yes\ncoef_interval: null\n")
    assert parse_optim_args(NAME, f"rank=2,config={file}").options == {
        "rank": 2,
        "eps": 1e-6,
        "betas": (0.8, 0.9),
        "packed": True,
        "coef_interval": None,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnak: 8", r"unknown option 'rnak' \(nearest: 'rank'\)"),
        ("rank: 8.5", "rank = '8.5' is not allowed"),
        ("rank: {a: 1}", "rank = .* is not allowed"),
        ("- rank", "must hold `key: value` lines"),
        ("rank: [", "is not valid YAML"),
        ("config: other.yaml", "names another config file"),
        ("rank: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_wrong_config_file(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_optim_args(NAME, f"config={file}")
