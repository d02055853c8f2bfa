"""Training of the tiny LLaMA on one rank of several, or alone: the same loop for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hf_precond import option_specs
from hf_precond.optim.flat_state import flat_state
from tests.distributed.tiny_llama import TinyLlama, share
from tests.suite.building import SMALL
from trainer_ext import build_optimizer
from trainer_ext.checkpoint import load_optimizer, save_optimizer

LR = 0.01
DECAY = 0.1
STEPS = 10
# More that is due often enough, what is meant for wider layers than these, and no matrix that
# takes seconds to decompose.
_OPTIONS: dict[str, Any] = {
    **SMALL,
    "basis_interval": 2,
    "projection_interval": 2,
    "factor_form": "brand",
    "max_elements": 300,
}

# Mode of a run -> (how the parameters lie, the option `sharding`).
MODES: dict[str, tuple[str, str]] = {
    "replicated": ("ddp", "replicated"),
    "owner": ("ddp", "owner"),
    "blocks": ("ddp", "blocks"),
    "fsdp2": ("fsdp2", "auto"),
    "fsdp2-owner": ("fsdp2", "owner"),
    "fsdp2-replicated": ("fsdp2", "replicated"),
    "hsdp": ("hsdp", "auto"),
    "hsdp-owner": ("hsdp", "owner"),
    "tp": ("tp", "auto"),
    "tp-owner": ("tp", "owner"),
}
BLOCKWISE = ("shared_basis_adagrad", "shared_basis_adam", "block_adam")

# One for each way to work: in rows, in bases, with what layers have seen.
FEW = ("shared_basis_adagrad", "soap", "kfac")

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how it is spread over ranks.

    Attributes:
        mode: a key of :data:`MODES`; alone it makes no difference.
        dtype: of the weights.
        gaps: steps at which one module, and so its parameters, take no part.
        rate: factor of the learning rate by step.
        options: of the optimizer, in place of the small ones.
    """

    name: str
    mode: str = "replicated"
    dtype: torch.dtype = torch.float64
    gaps: tuple[int, ...] = ()
    lr: float = LR
    rate: Callable[[int], float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def on(self, mode: str) -> Run:
        """The same run in another mode."""
        return replace(self, mode=mode)


class Training:
    """Model, optimizer and loop of one rank."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = TinyLlama(run.dtype)
        self.rank, self.world = rank_and_world()
        self.placement = MODES[run.mode][0] if self.world > 1 else "alone"
        place(self.model, self.placement)
        self.optimizer = build_optimizer(
            self.model, run.name, lr=run.lr, weight_decay=DECAY, **options_of(run)
        )
        self.scheduler = (
            None
            if run.rate is None
            else torch.optim.lr_scheduler.LambdaLR(self.optimizer, run.rate)
        )
        self.parallel: nn.Module = self.model
        if self.placement == "ddp":
            # Without it the second backward pass fills other buckets than the first, sums them in
            # another order, and a resumed run is equal to rounding only.
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=True)

    def backward(self, step: int) -> float:
        """Gradients of one step from this rank's share; returns its loss."""
        self.optimizer.zero_grad()
        # Ranks of one tensor-parallel model see the same samples.
        sees_all = self.placement in ("alone", "tp")
        tokens, values = share(step, 0, 1) if sees_all else share(step, self.rank, self.world)
        loss = self.parallel(tokens, values, leave_out=step in self.run.gaps)
        loss.backward()
        return loss.item()

    def step(self) -> None:
        """Takes the optimizer's step, and the schedule's."""
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def take(self, steps: Iterable[int]) -> Training:
        """Takes some steps, each with a batch of its own."""
        for step in steps:
            self.backward(step)
            self.step()
        return self

    def weights(self) -> Weights:
        """Copies of the whole weights, on every rank."""
        return {name: full(param).clone() for name, param in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Copies of the whole state, on every rank, by the keys one rank would have."""
        tensors, _ = flat_state(self.optimizer)
        return {key: full(tensor).clone() for key, tensor in tensors.items()}

    def load_weights(self, weights: Weights) -> None:
        """Takes whole weights, each rank its part."""
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_(spread(weights[name], param))


# -- scenarios --


def trained(run: Run, steps: int = STEPS) -> Weights:
    """Weights after the first steps of a run."""
    return Training(run).take(range(steps)).weights()


def saved(run: Run, folder: Path, steps: int) -> Weights:
    """Takes the first steps, writes the optimizer's state and the weights, and goes on."""
    training = Training(run).take(range(steps))
    save_optimizer(training.optimizer, folder)
    weights = training.weights()
    if training.rank == 0:
        torch.save(weights, folder / "weights.pt")
    return training.take(range(steps, STEPS)).weights()


def resumed(run: Run, folder: Path, steps: Iterable[int]) -> Weights:
    """Goes on from what :func:`saved` wrote, in any mode and on any number of ranks."""
    training = Training(run)
    training.load_weights(torch.load(folder / "weights.pt", weights_only=True))
    load_optimizer(training.optimizer, folder)
    return training.take(steps).weights()


# -- how it is built --


def options_of(run: Run) -> dict[str, Any]:
    """Options of the run's optimizer: the small ones where it has them, its own, its sharding."""
    known = option_specs(run.name)
    small = {key: value for key, value in _OPTIONS.items() if key in known}
    return {**small, "sharding": MODES[run.mode][1], **run.options}


def place(model: TinyLlama, placement: str) -> None:
    """Spreads a model's parameters over the ranks, where they are to be spread."""
    if placement == "fsdp2":
        shard(model)
    elif placement == "hsdp":
        shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif placement == "tp":
        split(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def shard(model: TinyLlama, mesh: DeviceMesh | None = None) -> None:
    """FSDP2 as the Trainer does it: layer by layer, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split(model: TinyLlama, mesh: DeviceMesh) -> None:
    """Tensor parallelism: the first kernels of each block by outputs, the last by inputs."""
    rows, columns = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
    plan = {f"self_attn.{name}": ColwiseParallel() for name in rows}
    plan |= {f"self_attn.{name}": RowwiseParallel() for name in columns}
    plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    plan |= {"mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def rank_and_world() -> tuple[int, int]:
    """This process among all; alone where there is no group."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(whole: Tensor, param: Tensor) -> Tensor:
    """A whole tensor, spread as ``param`` is."""
    if not isinstance(param, DTensor):
        return whole
    return distribute_tensor(whole, param.device_mesh, param.placements)
