from __future__ import annotations

from dataclasses import dataclass

import pytest

from hf_precond.preconditioners.base import StepContext, allowed_values, check_options, option


@dataclass(frozen=True, kw_only=True)
class Options:
    share: float = option(0.5, "", low=0, high=1, high_open=True)
    size: float = option(1.0, "", low=0, low_open=True)
    pair: tuple[float, float] = option((0.1, 0.2), "", low=0, high=1)
    kind: str = option("a", "", choices=("a", "b"))
    maybe: int | None = option(None, "", low=1)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_due_at_the_first_step_and_every_interval_after(interval: int) -> None:
    due = [step for step in range(1, 12) if StepContext(step=step).due(interval)]
    assert due == list(range(1, 12, interval))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.0}, r"share = 1\.0 is not allowed: it must be >= 0 and < 1"),
        ({"share": -0.1}, r"share = -0\.1 .* >= 0 and < 1"),
        ({"size": 0.0}, r"size = 0\.0 .* > 0$"),
        ({"size": float("inf")}, r"size = inf .* > 0 and finite"),
        ({"size": float("nan")}, "size = nan"),
        ({"pair": (0.1, 1.5)}, r"pair = \(0\.1, 1\.5\)"),
        ({"kind": "c"}, "kind = 'c' .* one of 'a', 'b'"),
        ({"maybe": 0}, "maybe = 0 .* >= 1"),
    ],
)
def test_check_options_names_option_value_and_range(values: dict, message: str) -> None:
    check_options(Options())
    with pytest.raises(ValueError, match=message):
        check_options(Options(**values))


def test_allowed_values_are_empty_without_limits() -> None:
    assert allowed_values(option(1, "").metadata) == ""
