"""What one optimizer step does to one parameter: a literal float64 transcript, no stacking.

    gradient -> statistics -> direction d -> grafting -> first moment -> decoupled decay -> weight

The algorithm itself is a pair ``update(g)``, ``apply(g)`` per group of a view, such as
:class:`~tests.reference.shared_basis.SharedBasisReference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

TINY_NORM = 1e-25
TINY_ROOT = 1e-10


class GroupReference(Protocol):
    """One group of blocks of an algorithm under test."""

    def update(self, grads: Tensor) -> None: ...

    def apply(self, grads: Tensor) -> Tensor: ...


@runtime_checkable
class FollowsMoment(Protocol):
    """One that also looks at what is to be preconditioned, before it sees the gradient."""

    def follow(self, moment: Tensor) -> None: ...


class BlockView(Protocol):
    """What the reference needs of a view: a copy to and from [G, M, B]."""

    def to_blocks(self, tensor: Tensor) -> Tensor: ...

    def copy_from_blocks(self, tensor: Tensor, blocks: Tensor) -> None: ...


@dataclass(kw_only=True)
class Graft:
    """The step s of a diagonal method on one parameter, whose norm the direction takes over."""

    kind: str
    beta2: float
    steps: int = 0
    exp_avg_sq: Tensor | float = 0.0

    def update(self, g: Tensor) -> None:
        """Takes the gradient into the second moment."""
        self.steps += 1
        old, new = (1.0, 1.0) if self.sums else (self.beta2, 1.0 - self.beta2)
        self.exp_avg_sq = old * self.exp_avg_sq + new * self._normalized(g) ** 2

    def step(self, x: Tensor) -> Tensor:
        """Returns s for the gradient, or for its momentum where that is preconditioned.

        Without a graft partner that is the gradient (or momentum) itself.
        """
        s = self._normalized(x)
        if self.kind in ("none", "sgd", "sgd_normalized"):
            return s
        correction = 1.0
        if self.kind in ("adam", "adam_normalized") and not self.sums:
            correction = 1.0 - self.beta2**self.steps
        return s / (torch.as_tensor(self.exp_avg_sq / correction).sqrt() + TINY_ROOT)

    @property
    def sums(self) -> bool:
        """A decay of one means a sum too (the convention of scalable Shampoo)."""
        return self.kind.startswith("adagrad") or self.beta2 == 1.0

    def _normalized(self, x: Tensor) -> Tensor:
        return x / (x.norm() + TINY_NORM) if self.kind.endswith("_normalized") else x


@dataclass(kw_only=True)
class MatrixReference:
    """One parameter with matrix views.

    Args:
        groups: ``(view, group index) -> algorithm``, called once for each group.
        graft_scope: the pieces whose norms are taken over: the "parameter", every "view" or
            every "group".
    """

    weight: Tensor
    views: Sequence[BlockView]
    groups: Callable[[int, int], GroupReference]
    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    momentum: str = "ema"
    momentum_site: str = "direction"
    nesterov: bool = False
    start_step: int = 1
    graft: str = "rmsprop_normalized"
    graft_beta2: float = 0.999
    graft_scope: str = "parameter"
    steps: int = 0
    moment: Tensor | None = None
    algorithms: dict[tuple[int, int], GroupReference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.diagonal = Graft(kind=self.graft, beta2=self.graft_beta2)
        for v, view in enumerate(self.views):
            for g in range(len(view.to_blocks(self.weight))):
                self.algorithms[v, g] = self.groups(v, g)

    def step(self, grad: Tensor | None) -> None:
        """Moves the weight by one step; without a finite gradient everything stays as it was."""
        if grad is None or not grad.isfinite().all():
            return
        self.steps += 1
        moment = self._first_moment(grad) if self.momentum_site == "gradient" else grad
        self._each_group(self._update_group, grad, moment)
        self.diagonal.update(grad)
        graft_step = self.diagonal.step(moment)
        if self.steps >= self.start_step:
            direction = self._each_group(lambda key, x: self.algorithms[key].apply(x), moment)
            if self.graft != "none":
                direction = self._take_norms(direction, graft_step)
        else:
            direction = grad if self.graft == "none" else graft_step
        if self.momentum_site == "direction":
            direction = self._first_moment(direction)
        self.weight = self.weight - self.lr * self.weight_decay * self.weight - self.lr * direction

    def _update_group(self, key: tuple[int, int], grads: Tensor, moment: Tensor) -> None:
        algorithm = self.algorithms[key]
        if isinstance(algorithm, FollowsMoment):
            algorithm.follow(moment)
        algorithm.update(grads)

    def _take_norms(self, direction: Tensor, graft_step: Tensor) -> Tensor:
        def rescale(_: object, d: Tensor, s: Tensor) -> Tensor:
            return d * (s.norm() / (d.norm() + TINY_NORM))

        if self.graft_scope == "parameter":
            return rescale(None, direction, graft_step)
        each = self._each_view if self.graft_scope == "view" else self._each_group
        return each(rescale, direction, graft_step)

    def _each_group(self, act: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor:
        def act_on_view(v: int, *blocks: Tensor) -> Tensor | None:
            done = [act((v, g), *parts) for g, parts in enumerate(zip(*blocks, strict=True))]
            return None if done[0] is None else torch.stack(done)

        return self._each_view(act_on_view, *tensors)

    def _each_view(self, act: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor:
        out = torch.zeros_like(tensors[0])
        for v, view in enumerate(self.views):
            done = act(v, *(view.to_blocks(x) for x in tensors))
            if done is not None:
                view.copy_from_blocks(out, done)
        return out

    def _first_moment(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.moment is None else self.moment
        if self.momentum == "none":
            return x
        weight = 1.0 if self.momentum == "heavy_ball" else 1.0 - self.beta1
        self.moment = self.beta1 * before + weight * x
        moment, averaged = self.moment, self.steps
        if self.nesterov:  # as if the same gradient came once more
            moment, averaged = self.beta1 * moment + weight * x, self.steps + 1
        return moment if self.momentum == "heavy_ball" else moment / (1.0 - self.beta1**averaged)


@dataclass(kw_only=True)
class AdamReference:
    """AdamW of a parameter without a matrix view."""

    weight: Tensor
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    exp_avg: Tensor | float = 0.0
    exp_avg_sq: Tensor | float = 0.0

    def step(self, grad: Tensor | None) -> None:
        """W <- W - lr wd W - lr m^ / (sqrt(v^) + eps), bias-corrected."""
        if grad is None or not grad.isfinite().all():
            return
        self.steps += 1
        beta1, beta2 = self.betas
        self.exp_avg = beta1 * self.exp_avg + (1.0 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1.0 - beta2) * grad**2
        first = self.exp_avg / (1.0 - beta1**self.steps)
        second = self.exp_avg_sq / (1.0 - beta2**self.steps)
        decayed = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = decayed - self.lr * first / (second.sqrt() + self.eps)


@dataclass(kw_only=True)
class SgdReference:
    """SGD with heavy-ball momentum of a parameter without a matrix view."""

    weight: Tensor
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    buffer: Tensor | float = 0.0

    def step(self, grad: Tensor | None) -> None:
        """W <- W - lr wd W - lr (momentum * buffer + g)."""
        if grad is None or not grad.isfinite().all():
            return
        self.buffer = self.momentum * self.buffer + grad
        decayed = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = decayed - self.lr * self.buffer
