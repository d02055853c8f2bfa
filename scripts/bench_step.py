#!/usr/bin/env python
"""Times whole training steps and optimizer steps, interleaved with fused AdamW.

    scripts/bench_step.py --preset gpt2-7m --batch_size 32 --block_size 128 --rounds 5
    scripts/bench_step.py --optims shared_basis_adagrad:update_interval=10 shampoo soap muon

Each round runs every contender for one cycle of steps (forward, backward, step on the same shapes),
in turn, so that a slow minute of the machine hits all alike. The table gives medians over rounds,
ratios to AdamW, state bytes and, for the shared-basis methods, the distance to the floor:
floating-point operations over the measured matrix-product rate plus bytes over the measured
bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_precond import PreconditionedOptimizer
from hf_precond.linalg.eigen import eigh
from hf_precond.preconditioners.base import layer_needs
from hf_precond.preconditioners.shared_basis import SharedBasis
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.data.presets import PRESETS, override_config, preset_config
from trainer_ext.provenance import provenance
from trainer_ext.reports import write_json
from trainer_ext.timing import now

BASELINE = "adamw_fused"


@dataclass(kw_only=True)
class Contender:
    """One optimizer with its own copy of the model, and its times in seconds."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    optimizer_s: list[float] = field(default_factory=list)
    forward_backward_s: list[float] = field(default_factory=list)

    @property
    def captures(self) -> bool:
        """Whether the optimizer looks inside the layers."""
        return isinstance(self.optimizer, PreconditionedOptimizer) and (
            layer_needs(self.optimizer.recipe.algorithm) is not None
        )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Lower bounds of one mean optimizer step and the measured cost of its eigh, in ms."""

    products_ms: float
    bytes_ms: float
    eigh_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the table and writes the JSON file."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    contenders = build_contenders(args, device)
    batch = token_batch(contenders[0].model, args, device)
    for contender in contenders:
        run_cycle(contender, batch, 1, device, keep=False)
    for number in range(args.rounds):
        for contender in contenders:
            run_cycle(contender, batch, args.cycle, device)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    result = report(contenders, args, device)
    print(format_report(result))
    if args.output is not None:
        write_json(args.output, result)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gpt2-7m")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--config_overrides", default="", help="of the preset, n_embd=128,...")
    parser.add_argument(
        "--optims",
        nargs="+",
        default=["shared_basis_adagrad", "shared_basis_adagrad:update_interval=10"],
        metavar="NAME[:OPTIONS]",
        help="names with options as in optim_args: soap:basis_interval=5,max_dim=512",
    )
    parser.add_argument("--cycle", type=int, default=10, help="steps per contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, help="JSON file, for example results/bench_step.json"
    )
    return parser.parse_args(argv)


def build_contenders(args: argparse.Namespace, device: torch.device) -> list[Contender]:
    """AdamW and every requested optimizer and interval, each on a model of equal weights."""
    contenders = []
    model = new_model(args, device)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    contenders.append(Contender(name=BASELINE, model=model, optimizer=adamw))
    for label in args.optims:
        name, _, text = label.partition(":")
        model = new_model(args, device)
        optimizer = build_optimizer(model, name, lr=1e-4, **parse_optim_args(name, text).options)
        contenders.append(Contender(name=label, model=model, optimizer=optimizer))
    return contenders


def new_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A freshly initialised model; the same weights for every contender."""
    torch.manual_seed(args.seed)
    config = preset_config(args.preset)
    if args.config_overrides:
        override_config(config, args.config_overrides)
    return AutoModelForCausalLM.from_config(config).to(device)


def token_batch(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Random token ids ``[batch, block]``."""
    vocab_size = model.config.vocab_size
    return torch.randint(vocab_size, (args.batch_size, args.block_size), device=device)


def run_cycle(
    contender: Contender, batch: Tensor, steps: int, device: torch.device, *, keep: bool = True
) -> None:
    """Runs training steps and keeps the mean times of forward-backward and of the optimizer."""
    forward_backward = optimizer = 0.0
    for _ in range(steps):
        start = now(device)
        contender.model(input_ids=batch, labels=batch).loss.backward()
        middle = now(device)
        contender.optimizer.step()
        end = now(device)
        contender.optimizer.zero_grad()
        forward_backward += middle - start
        optimizer += end - middle
    if keep:
        contender.forward_backward_s.append(forward_backward / steps)
        contender.optimizer_s.append(optimizer / steps)


# --- the floor ------------------------------------------------------------------------------------


def floor(
    optimizer: PreconditionedOptimizer, rates: dict[str, float], device: torch.device
) -> Floor:
    """Operations and bytes no implementation of one mean step can go below, over measured rates.

    Per weight of a stack with rank k: 4 k operations a step (6 with a diagonal tail) and, every
    ``update_interval``, 8 k (12 with the block bound of the escaped mass) for a basis update.
    Bytes: the gradient read; weight, momentum and graft read and written; roots and tail read at
    every step, and with the coefficients read and written at every basis update.
    """
    algorithm = optimizer.recipe.algorithm
    assert isinstance(algorithm, SharedBasis), "the floor is that of the shared-basis methods"
    interval = algorithm.update_interval
    root_interval = algorithm.root_interval or algorithm.coef_interval or interval
    has_tail = algorithm.tail == "diagonal"
    per_step = 6 if has_tail else 4
    per_update = 12 if algorithm.escaped_norm == "block" else 8
    flops = numbers = eigh_s = 0.0
    for groups, blocks, size in main_stacks(optimizer):
        weights = groups * blocks * size
        rank = algorithm.effective_rank(size)
        small = groups * blocks * rank**2
        flops += weights * rank * (per_step + per_update / interval)
        numbers += weights * (7 + has_tail * (1 + 2 / interval)) + small * (1 + 4 / interval)
        matrices = groups if algorithm.pool == 1 else groups * blocks
        eigh_s += time_eigh(matrices, rank, device) / root_interval
    numbers += 7 * sum(row.num_params for row in optimizer.plan() if row.algorithm == "adam")
    return Floor(
        products_ms=1e3 * flops / rates["flops"],
        bytes_ms=1e3 * 4 * numbers / rates["bytes"],
        eigh_ms=1e3 * eigh_s,
    )


def main_stacks(optimizer: PreconditionedOptimizer) -> list[tuple[int, int, int]]:
    """(G, M, B) of every view that is preconditioned."""
    return [
        (view[4][0], view[4][1], view[4][2])
        for group in optimizer.param_groups
        for views in group["views"]
        for view in views
    ]


def time_eigh(count: int, rank: int, device: torch.device) -> float:
    """Seconds of one stacked eigendecomposition ``[count, rank, rank]``."""
    root = torch.randn(count, rank, rank, device=device)
    return best_time(lambda: eigh(root @ root.mT), device, repeats=1)


def measured_rates(device: torch.device) -> dict[str, float]:
    """Rate of the thin matrix products used here (FLOP/s) and memory bandwidth (bytes/s)."""
    tall, thin = torch.randn(4096, 1024, device=device), torch.randn(1024, 16, device=device)
    source = torch.randn(64 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    product_s = best_time(lambda: tall @ thin, device, repeats=10)
    copy_s = best_time(lambda: target.copy_(source), device, repeats=10)
    return {"flops": 2 * 4096 * 1024 * 16 / product_s, "bytes": 2 * 64 * 2**20 / copy_s}


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
    contenders: Sequence[Contender], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Medians, ratios to AdamW, floors and everything needed to repeat the run."""
    rates = measured_rates(device)
    plain = [contender for contender in contenders if not contender.captures]
    compute = statistics.median(s for c in plain for s in c.forward_backward_s)
    baseline = statistics.median(contenders[0].optimizer_s)
    rows = []
    for contender in contenders:
        step = statistics.median(contender.optimizer_s)
        # Capturing what layers see takes its time in the forward and backward passes.
        captures = contender.captures
        own = statistics.median(contender.forward_backward_s) if captures else compute
        row: dict[str, Any] = {
            "name": contender.name,
            "optimizer_ms": 1e3 * step,
            "optimizer_ratio": step / baseline,
            "forward_backward_ratio": own / compute,
            "whole_step_ratio": (own + step) / (compute + baseline),
            "rounds_optimizer_ms": [1e3 * s for s in contender.optimizer_s],
            "rounds_forward_backward_ms": [1e3 * s for s in contender.forward_backward_s],
        }
        if isinstance(contender.optimizer, PreconditionedOptimizer):
            if isinstance(contender.optimizer.recipe.algorithm, SharedBasis):
                row["floor"] = asdict(floor(contender.optimizer, rates, device))
            row["state_bytes"] = sum(plan.state_bytes for plan in contender.optimizer.plan())
        else:
            row["state_bytes"] = state_bytes(contender.optimizer)
        rows.append(row)
    return {
        **provenance(__file__, args),
        "tokens_per_step": args.batch_size * args.block_size,
        "forward_backward_ms": 1e3 * compute,
        "measured_rates": rates,
        "rows": rows,
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors but step counters."""
    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
        if tensor.ndim
    )


def format_report(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        f"{result['tokens_per_step']} tokens, forward and backward "
        f"{result['forward_backward_ms']:.0f} ms; products at "
        f"{result['measured_rates']['flops'] / 1e9:.0f} GFLOP/s, memory at "
        f"{result['measured_rates']['bytes'] / 1e9:.1f} GB/s",
        "",
        "| optimizer | step ms | of AdamW's | whole step | state | floor ms (products + bytes) "
        "| eigh ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    baseline_bytes = result["rows"][0]["state_bytes"]
    for row in result["rows"]:
        bound, eigen = "", ""
        if "floor" in row:
            low = row["floor"]["products_ms"] + row["floor"]["bytes_ms"]
            bound = f"{low:.1f} (x{row['optimizer_ms'] / low:.1f})"
            eigen = f"{row['floor']['eigh_ms']:.1f}"
        lines.append(
            f"| {row['name']} | {row['optimizer_ms']:.1f} | {row['optimizer_ratio']:.2f} | "
            f"{row['whole_step_ratio']:.3f} | {row['state_bytes'] / baseline_bytes:.2f} | {bound} "
            f"| {eigen} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
