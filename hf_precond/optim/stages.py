"""The stages around an algorithm: grafting and momentum (ALGORITHMS, the pipeline).

    statistics when due -> direction -> grafting -> clip -> first moment -> decay -> weight

All functions work on stacked ``[G, M, B]`` tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.fused import fused
from hf_precond.preconditioners.base import Shape, State, check_options, option

GRAFTS = (
    "none",
    "sgd",
    "sgd_normalized",
    "adagrad",
    "adagrad_normalized",
    "rmsprop",
    "rmsprop_normalized",
    "adam",
    "adam_normalized",
)
CLIPS = ("none", "update_rms", "kl")
_CLIP_LIMITS = {"none": 1.0, "update_rms": 0.07, "kl": 1e-3}
NORM_EPS = 1e-25
_GRAFT_EPS = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """Momentum, grafting and the first steps: what happens around every algorithm."""

    beta1: float = option(0.9, "decay of the first moment", low=0, high=1, high_open=True)
    momentum: str = option(
        "ema",
        "first moment as a bias-corrected average, a heavy-ball sum, or none",
        choices=("ema", "heavy_ball", "none"),
    )
    nesterov: bool = option(
        False, "look ahead: the moment as it will be when the same gradient comes once more"
    )
    momentum_site: str = option(
        "direction",
        "first moment of the grafted direction, or of the gradient that is preconditioned",
        choices=("direction", "gradient"),
    )
    start_step: int = option(1, "before this step the graft partner's step is taken", low=1)
    graft: str = option(
        "rmsprop_normalized", "diagonal method whose step norm the direction takes", choices=GRAFTS
    )
    graft_scope: str = option(
        "parameter",
        "tensor over which the two norms are compared",
        choices=("parameter", "view", "group"),
    )
    graft_beta2: float | None = option(
        None, "decay of the graft's second moment (none: beta2)", low=0, high=1
    )

    max_grad_norm: float | None = option(
        None,
        "clip the gradient's norm over all parameters, as the Trainer does, counting gradients "
        "that were not formed",
        low=0,
        low_open=True,
    )
    clip_mode: str = option(
        "none",
        "shorten a parameter's direction to a root mean square, or all directions to a bound of "
        "lr^2 <direction, gradient> (the KL divergence of K-FAC)",
        choices=CLIPS,
    )
    clip_value: float | None = option(
        None, "limit of the clip (none: 0.07 for update_rms, 0.001 for kl)", low=0, low_open=True
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def clip_limit(self) -> float:
        """The limit, or the clip's usual one."""
        return _CLIP_LIMITS[self.clip_mode] if self.clip_value is None else self.clip_value

    @property
    def graft_kind(self) -> str:
        """The graft without its suffix."""
        return self.graft.removesuffix("_normalized")

    @property
    def graft_normalizes(self) -> bool:
        """Whether the graft sees the gradient divided by its norm over the whole parameter."""
        return self.graft.endswith("_normalized")

    @property
    def graft_has_state(self) -> bool:
        """Whether the graft keeps a second moment."""
        return self.graft_kind in {"adagrad", "rmsprop", "adam"}

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        """Allocates the stages' own state, each tensor ``[G, M, B]``."""
        names = []
        if self.momentum != "none":
            names.append("exp_avg" if self.momentum == "ema" else "momentum_buffer")
        if self.graft_has_state:
            names.append("graft_sq")
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}

    def averaged_gradient(self, state: State) -> Tensor | None:
        """The average of gradients that the state has, up to a factor; None where it has none."""
        if self.momentum_site != "gradient" or self.momentum == "none":
            return None
        return state["exp_avg" if self.momentum == "ema" else "momentum_buffer"]


# The fallback algorithms keep their own moments: nothing happens around them.
NO_STAGES = StageOptions(momentum="none", graft="none")


def momentum_(options: StageOptions, state: State, x: Tensor, step: int) -> tuple[Tensor, float]:
    """Takes ``x`` into the first moment, in place.

    Returns:
        the moment (may be the state tensor itself: not to be written to) and the factor that
        corrects its bias.
    """
    beta1, kind = options.beta1, options.momentum
    if kind == "none":
        return x, 1.0
    moment = state["exp_avg" if kind == "ema" else "momentum_buffer"]
    if options.nesterov:
        out, done = _nesterov_(moment, x, kind=kind, beta1=beta1), step + 1
    else:
        _take_in_(moment, x, kind=kind, beta1=beta1)
        out, done = moment, step
    return out, 1 / (1 - beta1**done) if kind == "ema" else 1.0


def graft_input(options: StageOptions, x: Tensor, norm: Tensor) -> Tensor:
    """Returns what the graft partner sees of a gradient or momentum ``x``.

    Args:
        norm: norm of the whole parameter's ``x``, ``[G, 1, 1]``; used by the normalized kinds.
    """
    return _normalized(x, norm) if options.graft_normalizes else x


def graft_(
    options: StageOptions,
    state: State,
    gradient: tuple[Tensor, Tensor],
    moment: tuple[Tensor, Tensor],
    step: int,
) -> Tensor:
    """Takes a gradient into the graft's second moment, in place.

    Args:
        gradient: itself and its norm as in :func:`graft_input`.
        moment: the gradient or its momentum alike.

    Returns:
        the partner's step for the moment.
    """
    if not options.graft_has_state:
        return graft_input(options, *moment)
    beta2, kind = options.graft_beta2, options.graft_kind
    assert beta2 is not None, "the registry fills graft_beta2 in"
    # In Google's scalable Shampoo a decay of one means a sum, too.
    is_sum = kind == "adagrad" or beta2 == 1
    unbiased = kind == "adam" and not is_sum
    (g, g_norm), (m, m_norm) = gradient, moment
    return _grafted_(
        state["graft_sq"],
        g,
        None if m is g else m,
        g_norm if options.graft_normalizes else None,
        m_norm if options.graft_normalizes else None,
        (1 - beta2**step) ** 0.5 if unbiased else None,
        beta2=None if is_sum else beta2,
    )


# -- one pass over memory each, if compiled --


@fused
def _take_in_(moment: Tensor, x: Tensor, *, kind: str, beta1: float) -> None:
    """m <- beta1 m + (1 - beta1) x, or beta1 m + x."""
    if kind == "ema":
        moment.lerp_(x, 1 - beta1)
    else:
        moment.mul_(beta1).add_(x)


@fused
def _nesterov_(moment: Tensor, x: Tensor, *, kind: str, beta1: float) -> Tensor:
    """The same, and the moment as it will be when the same ``x`` comes once more."""
    if kind == "ema":
        return torch.lerp(x, moment.lerp_(x, 1 - beta1), beta1)
    return torch.add(x, moment.mul_(beta1).add_(x), alpha=beta1)


@fused
def _grafted_(
    second: Tensor,
    g: Tensor,
    m: Tensor | None,
    g_norm: Tensor | None,
    m_norm: Tensor | None,
    correction: float | Tensor | None,
    *,
    beta2: float | None,
) -> Tensor:
    """v <- beta2 v + (1 - beta2) g^2 (without decay: v + g^2), and m / (sqrt(v) / c + eps).

    Args:
        m: in place of the gradient.
        beta2: none for a sum.
    """
    seen = g if g_norm is None else _normalized(g, g_norm)
    if beta2 is None:
        second.addcmul_(seen, seen)
    else:
        second.mul_(beta2).addcmul_(seen, seen, value=1 - beta2)
    if m is not None:
        seen = m if m_norm is None else _normalized(m, m_norm)
    root = second.sqrt()
    if correction is not None:
        root.div_(correction)
    return torch.div(seen, root.add_(_GRAFT_EPS), out=root)


def _normalized(x: Tensor, norm: Tensor) -> Tensor:
    return x / (norm + NORM_EPS)
