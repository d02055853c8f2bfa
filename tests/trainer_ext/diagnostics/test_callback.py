"""Diagnostics of runs of the Trainer: what is looked at, what is written, what stays unchanged."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.trainer_ext.tiny import same_weights, tiny_gpt2, trainer
from trainer_ext.diagnostics import DiagnosticsCallback
from trainer_ext.diagnostics.collect import SampleSizes, choose_kernels, evenly, kernels_of
from trainer_ext.diagnostics.findings import METHODS, ROTATIONS

SMALL = SampleSizes(rows=6, columns=8, heads=2, picture=8, positions=40)
QUIET = {"save_strategy": "no", "optim": "adamw_torch", "optim_args": None}


def diagnose(
    folder: Path, model: nn.Module | None = None, changes: Any = None, **options: Any
) -> dict[str, Any]:
    """Runs the Trainer with diagnostics and returns findings.json."""
    run = trainer(folder, model, **{**QUIET, **(changes or {})})
    run.add_callback(DiagnosticsCallback(**{"steps": 3, "sizes": SMALL, **options}))
    run.train()
    return json.loads((folder / "diagnostics" / "findings.json").read_text())


def test_a_report_holds_every_figure_and_needs_no_other_file(tmp_path: Path) -> None:
    found = diagnose(tmp_path, starts=(0, 3), layers=["*.h.0.attn"], kfac=True)
    assert [(look["first_step"], look["steps"]) for look in found["looks"]] == [(1, 3), (4, 3)]
    folder = tmp_path / "diagnostics"
    drawn = {path.name for path in folder.glob("*.png")}
    figures = ("errors", "inputs", "structure", "rotation", "run", "kfac")
    assert drawn == {f"{name}-step-{first}.png" for name in figures for first in (1, 4)}
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawn)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert found["looks"][0]["advice"]["optim_args"] in page
    for sentence in found["looks"][0]["advice"]["sentences"]:
        assert sentence.replace("'", "&#39;") in page


def test_every_kernel_has_its_figures(tmp_path: Path) -> None:
    (look,) = diagnose(tmp_path)["looks"]
    names = [kernel["name"] for kernel in look["kernels"]]
    assert names[:4] == [
        "transformer.h.0.attn.c_attn[q]",
        "transformer.h.0.attn.c_attn[k]",
        "transformer.h.0.attn.c_attn[v]",
        "transformer.h.0.attn.c_proj",
    ]
    for kernel in look["kernels"]:
        assert set(kernel["errors"]) == set(METHODS)
        assert set(kernel["off_diagonal"]) == set(ROTATIONS)
        assert len(kernel["run"]["escaped"]) == 3
        assert kernel["input_rank"] >= 1
        assert bool(kernel["head_errors"]) == (".attn." in kernel["name"])
        for name, errors in kernel["errors"].items():
            values = list(errors.values())
            assert all(0 <= value <= 1 + 1e-9 for value in values), name
            assert name in ("frequent directions", "online") or values[-1] <= values[0] + 1e-9
        for rank, best in kernel["errors"]["separate"].items():
            assert best <= kernel["errors"]["shared"][rank] + 1e-12


def test_samples_are_parts_of_the_gradients(tmp_path: Path) -> None:
    """One step of a model whose gradient is known."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4, bias=False)

        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x) * weight).sum(-1).mean()}

    from trainer_ext.diagnostics.collect import Sampler

    model = Line()
    (kernel,) = kernels_of(model)
    sampler = Sampler(model, [kernel], SampleSizes(rows=2, columns=3, picture=2), steps=2)
    generator = torch.Generator().manual_seed(0)
    gradients, inputs = [], []
    for step in (1, 2):
        x, weight = (torch.randn(6, size, generator=generator) for size in (5, 4))
        sampler.arm(step)
        model.zero_grad()
        model(x, weight)["loss"].backward()
        sampler.take()
        gradients.append(weight.mT @ x / 6)
        inputs.append(x)
    samples = sampler.samples["layer"]
    chosen = torch.stack(gradients)[:, None, [0, 3]][..., [0, 2, 4]]
    torch.testing.assert_close(samples.g_TGMB, chosen)
    torch.testing.assert_close(torch.cat(samples.inputs), torch.cat(inputs))
    left, _, right = torch.linalg.svd(gradients[0], full_matrices=False)
    left, right = left[:, [0, 3]], right.mT[:, [0, 3]]
    torch.testing.assert_close(samples.two_sided[1], left.mT @ gradients[1] @ right)
    sampler.remove()
    assert not model.layer._forward_hooks
    assert not model._forward_pre_hooks


def test_training_is_unchanged_and_no_hook_stays(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", **QUIET)
    plain.train()
    run = trainer(tmp_path / "looked at", **QUIET)
    run.add_callback(
        DiagnosticsCallback(steps=2, starts=(1,), layers=["*.0.*"], sizes=SMALL, kfac=True)
    )
    run.train()
    assert same_weights(plain.model, run.model)
    assert not any(module._forward_hooks for module in run.model.modules())
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_health_of_our_optimizer_is_shown(tmp_path: Path) -> None:
    changes = {"optim": "shared_basis_adagrad", "optim_args": "rank=4", "logging_steps": 1}
    diagnose(tmp_path, changes=changes, layers=["*.0.mlp"])
    assert (tmp_path / "diagnostics" / "health-step-1.png").is_file()


def test_steps_without_finite_gradients_are_left_out_and_counted(tmp_path: Path) -> None:
    model = tiny_gpt2()
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * torch.nan if len(calls) == 2 else gradient

    model.transformer.h[0].mlp.c_fc.weight.register_hook(spoil)
    changes = {"optim": "two_sided_basis"}  # it leaves such a step out, too
    (look,) = diagnose(tmp_path, model, changes, steps=4, layers=["*.0.mlp"])["looks"]
    assert (look["steps"], look["skipped_steps"]) == (3, 1)
    assert "1 of these steps" in (tmp_path / "diagnostics" / "index.html").read_text()


def test_a_look_cut_short_counts_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (look,) = diagnose(tmp_path, steps=10, layers=["*.0.mlp"])["looks"]
    assert look["steps"] == 6
    assert "training ended after 6 of 10 steps" in caplog.text


def test_accumulation_counts_as_one_step(tmp_path: Path) -> None:
    (look,) = diagnose(tmp_path, changes={"gradient_accumulation_steps": 2}, layers=["*.0.mlp"])[
        "looks"
    ]
    assert look["steps"] == 3


def test_exit_leaves_nothing_of_the_run_behind(tmp_path: Path) -> None:
    run = trainer(tmp_path, **{**QUIET, "save_strategy": "steps", "save_steps": 1})
    run.add_callback(DiagnosticsCallback(steps=3, sizes=SMALL, then_exit=True))
    with pytest.raises(SystemExit) as stop:
        run.train()
    assert stop.value.code == 0
    assert run.state.global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["diagnostics"]


@pytest.mark.parametrize(("starts", "status"), [((0, 9), 0), ((9,), 1)])
def test_a_run_that_is_too_short_says_so_and_saves_nothing(
    starts: tuple[int, ...], status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, **QUIET)
    options = {"steps": 2, "sizes": SMALL, "layers": ["*.0.mlp"], "then_exit": True}
    run.add_callback(DiagnosticsCallback(starts=starts, **options))
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stop:
        run.train()
    assert stop.value.code == status
    assert "training ended at step 6, before the look after 9" in caplog.text
    assert (tmp_path / "diagnostics" / "index.html").is_file() == (status == 0)


class NotANumber(Trainer):
    """Whose loss never is one."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * float("nan")


@pytest.mark.parametrize("kfac", [False, True])
def test_a_look_without_finite_gradients_is_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kfac: bool
) -> None:
    run = trainer(tmp_path, kind=NotANumber, **QUIET)
    options = {"steps": 2, "sizes": SMALL, "layers": ["*.0.mlp.c_fc"], "then_exit": True}
    run.add_callback(DiagnosticsCallback(kfac=kfac, **options))
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stop:
        run.train()
    assert stop.value.code == 1
    assert "no look has seen two steps with finite gradients" in caplog.text


def test_kernels_of_a_kind_are_the_first_a_middle_and_the_last() -> None:
    kernels = kernels_of(tiny_gpt2(n_layer=6))
    chosen = choose_kernels(kernels, None)
    assert sorted({int(kernel.name.split(".")[2]) for kernel in chosen}) == [0, 2, 5]
    assert len(chosen) == 3 * 6
    assert [each.name for each in choose_kernels(kernels, ["*.h.1.attn"])] == [
        f"transformer.h.1.attn.{name}" for name in ("c_attn[q]", "c_attn[k]", "c_attn[v]", "c_proj")
    ]
    with pytest.raises(ValueError, match=r"layers='nothing' matches none of transformer\.h\.0"):
        choose_kernels(kernels, ["nothing"])
    with pytest.raises(ValueError, match="no matrix"):
        choose_kernels([], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1 must be at least 2"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"starts": (-1,)}, "starts=-1 must be at least 0"),
        ({"starts": (0, 5), "steps": 8}, "starts=5 is within the 8 steps from 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiagnosticsCallback(**options)


def test_indices_are_even() -> None:
    assert evenly(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert evenly(100, 3).tolist() == [0, 50, 99]
