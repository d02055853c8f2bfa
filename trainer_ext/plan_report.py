"""Plans of optimizers on a mesh (:mod:`trainer_ext.memory_plan`) as plain data and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_precond.explain import format_bytes
from trainer_ext.dry_run import Operations
from trainer_ext.memory_plan import Mesh, Plan, passes_traffic, plan_adamw, plan_optimizer
from trainer_ext.planned_rank import PURPOSES, Traffic


def plan_result(
    model: nn.Module, mesh: Mesh, optimizers: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """AdamW's plan and those of others, as plain data.

    Args:
        model: on the meta device.
        optimizers: name, options as they were written, options.

    Raises:
        ValueError: unknown name or option, or a value out of range.
    """
    rows = [as_row(plan_adamw(model, mesh), "")]
    for name, text, options in optimizers:
        rows.append(as_row(plan_optimizer(model, name, options, mesh), text))
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "passes": as_rows(passes_traffic(model, mesh)),
        "rows": rows,
    }


def as_row(plan: Plan, options: str) -> dict[str, Any]:
    """A plan as plain data; bytes and operations of one rank and one mean step."""
    mean = Operations()
    for of_rank in plan.operations:
        mean.add(of_rank, 1 / len(plan.operations))
    most = max(plan.operations, key=lambda operations: operations.total)
    return {
        "name": plan.name,
        "options": options,
        "state_bytes": {
            "max": max(plan.state_bytes),
            "mean": round(sum(plan.state_bytes) / len(plan.state_bytes)),
            "min": min(plan.state_bytes),
        },
        "temporary_bytes": plan.peak_bytes,
        "operations": {"mean": operation_counts(mean), "max": operation_counts(most)},
        "sent": as_rows(plan.traffic),
    }


def operation_counts(operations: Operations) -> dict[str, int]:
    """Operations by what they are, as whole numbers."""
    kinds = ("products", "decompositions", "elementwise", "total")
    return {kind: round(getattr(operations, kind)) for kind in kinds}


def as_rows(traffic: Traffic) -> list[dict[str, Any]]:
    """Traffic as plain data: calls, bytes handed in and bytes sent in a ring."""
    return [
        {
            "purpose": purpose,
            "collective": kind,
            "calls": round(sent.calls, 3),
            "handed_bytes": round(sent.handed),
            "ring_bytes": round(sent.wire),
        }
        for (purpose, kind), sent in sorted(traffic.items())
    ]


def format_report(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    passes = sum(entry["ring_bytes"] for entry in result["passes"])
    baseline = result["rows"][0]
    lines = [
        f"{result['parameters'] / 1e9:.3f}e9 parameters; forward and backward send "
        f"{format_bytes(passes)} a step from each rank",
        "",
        "| optimizer | state, fullest rank | of AdamW's | mean rank | temporaries | operations "
        "(most, mean) | sent by the optimizer | of the passes' |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        state, operations = row["state_bytes"], row["operations"]
        sent = sum(entry["ring_bytes"] for entry in row["sent"])
        share = f"{sent / passes:.1%}" if passes else ""
        lines.append(
            f"| {label_of(row)} | {format_bytes(state['max'])} | "
            f"{state['max'] / baseline['state_bytes']['max']:.2f} | "
            f"{format_bytes(state['mean'])} | {format_bytes(row['temporary_bytes'])} | "
            f"{operations['max']['total']:.2e}, {operations['mean']['total']:.2e} | "
            f"{format_bytes(sent)} | {share} |"
        )
    lines += ["", *operation_table(result["rows"]), "", *traffic_table(result["rows"])]
    return "\n".join(lines)


def operation_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a mean rank computes in a mean step."""
    kinds = ("products", "decompositions", "elementwise")
    lines = [f"| operations, mean rank | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    for row in rows:
        counts = (f"{row['operations']['mean'][kind]:.2e}" for kind in kinds)
        lines.append(f"| {label_of(row)} | {' | '.join(counts)} |")
    return lines


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the optimizers send, by what it is for; with the calls of a mean step."""
    lines = [f"| sent | {' | '.join(PURPOSES)} |", f"|---|{'---:|' * len(PURPOSES)}"]
    for row in rows:
        cells = []
        for purpose in PURPOSES:
            found = [entry for entry in row["sent"] if entry["purpose"] == purpose]
            calls = sum(entry["calls"] for entry in found)
            amount = sum(entry["ring_bytes"] for entry in found)
            cells.append(f"{format_bytes(amount)} ({calls:.3g})" if found else "")
        lines.append(f"| {label_of(row)} | {' | '.join(cells)} |")
    return lines


def label_of(row: Mapping[str, Any]) -> str:
    """An optimizer with its options."""
    return f"{row['name']}:{row['options']}" if row["options"] else str(row["name"])
