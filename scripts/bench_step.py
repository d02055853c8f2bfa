#!/usr/bin/env python
"""Times optimizer steps, interleaved with fused AdamW, beside the least time they could take.

    scripts/bench_step.py --preset gpt2-7m --batch_size 32 --block_size 128 --rounds 5
    scripts/bench_step.py --preset llama-130m --step_only --optims shared_basis_adam soap muon
    scripts/bench_step.py --preset llama-1b --layers 2 --step_only --optims two_sided_basis \\
        --others torch_muon pytorch_optimizer_soap
    scripts/bench_step.py --preset llama-130m --step_only --profile two_sided_basis

Each round runs every contender for one cycle of steps on the same shapes, in an order drawn anew,
so that a slow minute of the machine hits all alike: whole training steps, or with `--step_only`
optimizer steps on gradients that stay as they are. The table gives medians over rounds, ratios to
AdamW, state, and the floor: operations of matrix products and decompositions over the rate of a
large product, or bytes of weights, gradients and state, each passed over once, over the bandwidth
of a copy, whichever takes longer. Operations and bytes are counted on a cycle of real steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_precond import PreconditionedOptimizer, keep_freed_memory
from hf_precond.preconditioners.base import layer_needs
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.data.presets import PRESETS, override_config, preset_config
from trainer_ext.dry_run import DryRun
from trainer_ext.provenance import provenance
from trainer_ext.reports import show_report
from trainer_ext.step_times import num_bytes_of, optimizer_state_bytes, state_tensors
from trainer_ext.timing import mark, milliseconds, now
from trainer_ext.training_script import one_line_errors

BASELINE = "adamw_fused"
LEARNING_RATE = 1e-4
# What runs as compiled code shows no operations to be counted.
COMPILED = frozenset({"heavyball_soap"})
LAYER_KEYS = ("num_hidden_layers", "n_layer")


@dataclass(kw_only=True)
class Contender:
    """One optimizer with its own copy of the model, and its mean times per round."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    optimizer_ms: list[float] = field(default_factory=list)
    forward_backward_ms: list[float] = field(default_factory=list)

    @property
    def captures(self) -> bool:
        """Whether the optimizer looks inside the layers."""
        return isinstance(self.optimizer, PreconditionedOptimizer) and (
            layer_needs(self.optimizer.recipe.algorithm) is not None
        )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a mean step computes and moves, and the time of the longer of both.

    Attributes:
        flops: of matrix products and decompositions; none where they cannot be counted.
        bytes: of weights, gradients and state.
    """

    flops: float | None
    bytes: float
    ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the table and writes the files."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    keep_freed_memory()  # as the Trainer's extension does; it is to the benefit of all
    with one_line_errors():
        contenders, left_out = build_contenders(args, device)
    if args.profile is not None:
        print(profile(contenders[-1], token_batch(contenders[-1].model, args, device), args.cycle))
        return 0
    batch = token_batch(contenders[0].model, args, device)
    order = random.Random(args.seed)
    for contender in contenders:
        run_cycle(contender, batch, 1, device, step_only=args.step_only, keep=False)
    for number in range(args.rounds):
        for contender in order.sample(contenders, len(contenders)):
            run_cycle(contender, batch, args.cycle, device, step_only=args.step_only)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    result = report(contenders, left_out, args, device)
    stem = None if args.output is None else args.output.with_suffix("")
    show_report(result, format_report(result), plot, stem)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gpt2-7m")
    parser.add_argument("--layers", type=int, help="keep so many of the preset's equal layers")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--config_overrides", default="", help="of the preset, n_embd=128,...")
    parser.add_argument(
        "--optims",
        nargs="*",
        default=["shared_basis_adagrad", "shared_basis_adagrad:update_interval=10"],
        metavar="NAME[:OPTIONS]",
        help="names with options as in optim_args: soap:basis_interval=5,max_dim=512",
    )
    parser.add_argument(
        "--others",
        nargs="*",
        default=[],
        choices=tuple(OTHERS),
        help="optimizers of other packages, left out where the package is not installed",
    )
    parser.add_argument("--step_only", action="store_true", help="time optimizer steps only")
    parser.add_argument("--compile", action="store_true", help="our steps under torch.compile")
    parser.add_argument("--cycle", type=int, default=10, help="steps per contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profile", metavar="NAME[:OPTIONS]", help="where the time of one optimizer's steps goes"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; a table and a plot are written beside it"
    )
    return parser.parse_args(argv)


# --- contenders -----------------------------------------------------------------------------------


def build_contenders(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """AdamW and every requested optimizer on models of equal weights; who is left out, and why.

    Raises:
        ValueError: an unknown name or option.
    """
    contenders, left_out = [], {}

    def enter(name: str, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        model = new_model(args, device)
        contenders.append(Contender(name=name, model=model, optimizer=optimizer_of(model)))

    if args.profile is None:
        enter(BASELINE, lambda model: adamw(model.parameters()))
    for label in args.optims if args.profile is None else [args.profile]:
        name, _, text = label.partition(":")
        options = {**parse_optim_args(name, text).options}
        if args.compile:
            options["compile"] = True
        enter(
            label,
            lambda m, name=name, options=options: build_optimizer(
                m, name, lr=LEARNING_RATE, **options
            ),
        )
    for name in args.others if args.profile is None else ():
        package, build = OTHERS[name]
        if importlib.util.find_spec(package) is None:
            left_out[name] = f"{package} is not installed"
        else:
            enter(name, build)
    return contenders, left_out


def new_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A freshly initialised model; the same weights for every contender.

    Raises:
        ValueError: more layers than the preset has, or overrides that do not fit.
    """
    torch.manual_seed(args.seed)
    config = preset_config(args.preset)
    if args.layers is not None:
        key = next(key for key in LAYER_KEYS if key in PRESETS[args.preset])
        if not 1 <= args.layers <= getattr(config, key):
            raise ValueError(
                f"layers={args.layers} must be in 1..{getattr(config, key)}, the layers of "
                f"{args.preset}"
            )
        setattr(config, key, args.layers)
    if args.config_overrides:
        override_config(config, args.config_overrides)
    return AutoModelForCausalLM.from_config(config).to(device)


def adamw(params: Any) -> torch.optim.Optimizer:
    """torch's AdamW in its fused form."""
    return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices but embeddings and output layer, and all other parameters."""
    ends = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ends.add(id(model.get_output_embeddings().weight))
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for param in model.parameters():
        found[param.ndim != 2 or id(param) in ends].append(param)
    return found


class Both(torch.optim.Optimizer):
    """Two optimizers that step together, as torch's Muon and AdamW are meant to."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.parts = (first, second)

    def step(self, closure: Any = None) -> None:
        """Steps both."""
        for part in self.parts:
            part.step(closure)
        self.state = {**self.parts[0].state, **self.parts[1].state}


def torch_muon(model: nn.Module) -> torch.optim.Optimizer:
    """torch's Muon on the hidden matrices, AdamW on the rest."""
    matrices, rest = hidden_matrices(model)
    return Both(torch.optim.Muon(matrices, lr=LEARNING_RATE), adamw(rest))


def with_adamw(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    """A package's optimizer on the hidden matrices, AdamW on the rest, as ours have it."""

    def built(model: nn.Module) -> torch.optim.Optimizer:
        matrices, rest = hidden_matrices(model)
        return Both(build(matrices), adamw(rest))

    return built


def pytorch_optimizer_soap(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With its defaults: bases every 10 steps."""
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=LEARNING_RATE)


def pytorch_optimizer_shampoo(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Distributed Shampoo's form, with inverse roots every 10 steps as ours."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        params, lr=LEARNING_RATE, start_preconditioning_step=1, preconditioning_compute_steps=10
    )


def heavyball_soap(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With its defaults."""
    import heavyball

    return heavyball.SOAP(params, lr=LEARNING_RATE)


OTHERS: Mapping[str, tuple[str, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "torch_muon": ("torch", torch_muon),
    "pytorch_optimizer_soap": ("pytorch_optimizer", with_adamw(pytorch_optimizer_soap)),
    "pytorch_optimizer_shampoo": ("pytorch_optimizer", with_adamw(pytorch_optimizer_shampoo)),
    "heavyball_soap": ("heavyball", with_adamw(heavyball_soap)),
}


# --- steps ----------------------------------------------------------------------------------------


def token_batch(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Random token ids ``[batch, block]``."""
    vocab_size = model.config.vocab_size
    return torch.randint(vocab_size, (args.batch_size, args.block_size), device=device)


def backward(contender: Contender, batch: Tensor) -> None:
    """One forward and backward pass."""
    contender.model(input_ids=batch, labels=batch).loss.backward()


def run_cycle(
    contender: Contender,
    batch: Tensor,
    steps: int,
    device: torch.device,
    *,
    step_only: bool,
    keep: bool = True,
) -> None:
    """Runs steps and keeps the mean times of forward-backward and of the optimizer."""
    marks = []
    for _ in range(steps):
        start = mark(device)
        if needs_gradients(contender, step_only=step_only):
            contender.optimizer.zero_grad()
            backward(contender, batch)
        middle = mark(device)
        contender.optimizer.step()
        marks.append((start, middle, mark(device)))
    now(device)
    if keep:
        passes, own = zip(
            *((milliseconds(a, b), milliseconds(b, c)) for a, b, c in marks), strict=True
        )
        contender.forward_backward_ms.append(statistics.fmean(passes))
        contender.optimizer_ms.append(statistics.fmean(own))


def needs_gradients(contender: Contender, *, step_only: bool) -> bool:
    """Always but where the gradients of the first step serve all."""
    first = next(contender.model.parameters())
    return not step_only or contender.captures or first.grad is None


def profile(contender: Contender, batch: Tensor, steps: int) -> str:
    """torch's table of the operators that take most of some optimizer steps, after a first one."""
    backward(contender, batch)
    contender.optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if batch.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            contender.optimizer.step()
    sort_by = f"self_{'cuda' if batch.is_cuda else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=sort_by, row_limit=15)


# --- the floor ------------------------------------------------------------------------------------


def floor(contender: Contender, cycle: int, rates: Mapping[str, float]) -> Floor:
    """Of a mean step, counted on a cycle of real steps."""
    moved = 0
    with DryRun() as run:
        for _ in range(cycle):
            before = versions(contender.optimizer)
            contender.optimizer.step()
            moved += bytes_passed(contender.optimizer, before)
    operations = run.operations.per(cycle)
    flops, passed = operations.products + operations.decompositions, moved / cycle
    seconds = max(flops / rates["flops"], passed / rates["bytes"])
    counted = None if contender.name in COMPILED else flops
    return Floor(flops=counted, bytes=passed, ms=1e3 * seconds)


def bytes_passed(optimizer: torch.optim.Optimizer, before: Mapping[int, int]) -> int:
    """Weights read and written, gradients and state read, and written where it has changed."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    total = sum(3 * num_bytes_of(param) for param in params)
    for tensor in state_tensors(optimizer):
        changed = before.get(id(tensor)) != tensor._version
        total += num_bytes_of(tensor) * (1 + changed)
    return total


def versions(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """How often each tensor of the state has been changed in place."""
    return {id(tensor): tensor._version for tensor in state_tensors(optimizer)}


def measured_rates(device: torch.device) -> dict[str, float]:
    """Rate of a large matrix product (FLOP/s) and memory bandwidth of a copy (bytes/s)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    source = torch.randn(256 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    product_s = best_time(lambda: a @ b, device, repeats=10)
    copy_s = best_time(lambda: target.copy_(source), device, repeats=10)
    return {"flops": 2 * size**3 / product_s, "bytes": 2 * num_bytes_of(source) / copy_s}


def best_time(function: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Shortest of several timings after one warm-up, in seconds."""
    function()
    times = []
    for _ in range(repeats):
        start = now(device)
        function()
        times.append(now(device) - start)
    return min(times)


# --- the report -----------------------------------------------------------------------------------


def report(
    contenders: Sequence[Contender],
    left_out: Mapping[str, str],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Medians, ratios to AdamW, floors and everything needed to repeat the run."""
    rates = measured_rates(device)
    plain = [contender for contender in contenders if not contender.captures]
    compute = statistics.median(ms for c in plain for ms in c.forward_backward_ms)
    baseline = statistics.median(contenders[0].optimizer_ms)
    rows = []
    for contender in contenders:
        step = statistics.median(contender.optimizer_ms)
        low, _, high = quartiles(contender.optimizer_ms)
        row: dict[str, Any] = {
            "name": contender.name,
            "optimizer_ms": step,
            "optimizer_quartiles_ms": [low, high],
            "optimizer_ratio": step / baseline,
            "rounds_optimizer_ms": contender.optimizer_ms,
            "state_bytes": optimizer_state_bytes(contender.optimizer),
            "floor": asdict(floor(contender, args.cycle, rates)),
        }
        if not args.step_only:
            # Capturing what layers see takes its time in the forward and backward passes.
            captures = contender.captures
            own = statistics.median(contender.forward_backward_ms) if captures else compute
            row |= {
                "forward_backward_ratio": own / compute,
                "whole_step_ratio": (own + step) / (compute + baseline),
                "rounds_forward_backward_ms": contender.forward_backward_ms,
            }
        rows.append(row)
    model = contenders[0].model
    return {
        **provenance(__file__, args),
        "parameters": sum(param.numel() for param in model.parameters()),
        "tokens_per_step": args.batch_size * args.block_size,
        "forward_backward_ms": None if args.step_only else compute,
        "measured_rates": rates,
        "left_out": dict(left_out),
        "rows": rows,
    }


def quartiles(values: Sequence[float]) -> Sequence[float]:
    """Lower quartile, median, upper quartile; of a single value three times that.

    >>> quartiles([3.0])
    [3.0, 3.0, 3.0]
    """
    return statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3


def format_report(result: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rates, whole = result["measured_rates"], result["forward_backward_ms"] is not None
    passes = (
        f"{result['tokens_per_step']} tokens, forward and backward "
        f"{result['forward_backward_ms']:.0f} ms; "
        if whole
        else ""
    )
    columns = (
        *("optimizer", "step ms", "quartiles", "of AdamW's"),
        *(("whole step",) if whole else ()),
        *("state", "GFLOP", "MB", "FLOP per byte", "floor ms", "of the floor"),
    )
    lines = [
        f"{result['parameters'] / 1e6:.1f}M parameters; {passes}products at "
        f"{rates['flops'] / 1e9:.0f} GFLOP/s, memory at {rates['bytes'] / 1e9:.1f} GB/s",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    baseline_bytes = result["rows"][0]["state_bytes"]
    for row in result["rows"]:
        low, high = row["optimizer_quartiles_ms"]
        least = row["floor"]
        cells = (
            *(row["name"], f"{row['optimizer_ms']:.1f}", f"{low:.1f} - {high:.1f}"),
            f"{row['optimizer_ratio']:.2f}",
            *((f"{row['whole_step_ratio']:.3f}",) if whole else ()),
            f"{row['state_bytes'] / baseline_bytes:.2f}",
            "not counted" if least["flops"] is None else f"{least['flops'] / 1e9:.2f}",
            f"{least['bytes'] / 1e6:.0f}",
            "" if least["flops"] is None else f"{least['flops'] / least['bytes']:.1f}",
            *(f"{least['ms']:.1f}", f"{row['optimizer_ms'] / least['ms']:.1f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nleft out: {name}, {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the rate of each optimizer under both roofs, against operations per byte, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = result["measured_rates"]
    ridge = rates["flops"] / rates["bytes"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    reach = [1e-2, ridge, max(ridge, 10.0) * 30]
    axes.plot(reach, [min(rates["flops"], x * rates["bytes"]) / 1e9 for x in reach], color="black")
    for row in result["rows"]:
        least = row["floor"]
        if not least["flops"]:
            continue
        intensity = least["flops"] / least["bytes"]
        achieved = least["flops"] / row["optimizer_ms"] / 1e6
        axes.plot(intensity, achieved, marker="o", linestyle="none", label=row["name"])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of weights, gradients and state",
        ylabel="GFLOP/s of the optimizer step",
        title="products and decompositions under the roofs of this machine",
    )
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
