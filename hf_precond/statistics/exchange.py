"""What every process has captured, brought together on each of them in the same order.

Statistics must be equal bit for bit on all processes, or their weights drift apart. One small
exchange of sizes and one of all layers' columns in a flat buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from hf_precond.statistics.captured import Captured, with_length


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(
    captured: Mapping[str, Captured | None],
    features: Mapping[str, tuple[int, int]],
    *,
    by_sample: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Captured]:
    """Returns the columns of all processes, one after the other.

    Args:
        captured: the same names in the same order on every process; None where a layer was not used
            here.
        features: input and output features of each layer.
    """
    names = list(captured)
    header = torch.tensor([_sizes(captured[name]) for name in names], dtype=torch.float64)
    headers = _all_gather(header.to(device)).cpu()
    shapes = [
        [_shapes(row, features[name]) for row, name in zip(rank, names, strict=True)]
        for rank in headers
    ]
    counts = [sum(prod(shape) for layer in rank for shape in layer) for rank in shapes]
    flat = torch.zeros(max(counts), dtype=dtype, device=device)
    own = [
        part.flatten()
        for item in captured.values()
        if item is not None
        for part in (item.inputs, item.outputs, item.valid)
    ]
    if own:
        torch.cat(own, out=flat[: sum(part.numel() for part in own)])
    payloads = _all_gather(flat)
    unpacked = [_unpack(*pair) for pair in zip(payloads, shapes, strict=True)]
    found = {}
    for index, name in enumerate(names):
        parts = [rank[index] for rank in unpacked if rank[index][0].shape[0]]
        if not parts:
            continue
        length = max(part[0].shape[1] for part in parts)
        inputs, outputs, valid = (
            torch.cat([with_length(part[kind], length) for part in parts]) for kind in range(3)
        )
        found[name] = Captured(
            inputs=inputs,
            outputs=outputs,
            valid=valid,
            total=int(headers[:, index, 3].sum()),
            seen=int(headers[:, index, 2].sum()),
            by_sample=by_sample,
            reduced=bool(headers[:, index, 4].any()),
            processes=len(headers),
        )
    return found


def _sizes(item: Captured | None) -> list[float]:
    if item is None:
        return [0.0] * 5
    counts = (*item.inputs.shape[:2], item.seen, item.total, item.reduced)
    return [float(count) for count in counts]


def _shapes(row: Tensor, features: tuple[int, int]) -> list[tuple[int, ...]]:
    samples, positions = int(row[0]), int(row[1])
    return [(samples, positions, size) for size in features] + [(samples, positions)]


def _unpack(flat: Tensor, shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
    sizes = [prod(shape) for layer in shapes for shape in layer]
    pieces = iter(flat[: sum(sizes)].split(sizes))
    return [[next(pieces).view(shape) for shape in layer] for layer in shapes]


def _all_gather(x: Tensor) -> Tensor:
    """Stacks a tensor of equal shape over all processes."""
    out = x.new_empty(world_size(), *x.shape)
    dist.all_gather(list(out.unbind()), x)
    return out
