"""This rank's parts of parameters while a step changes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from hf_precond.linalg.rounding import HALF_DTYPES, round_stochastically
from hf_precond.optim.sharding import local


class Weights:
    """Hands out weights to be changed in place, and rounds those that were changed as copies.

    Args:
        params: all parameters.
        stochastic_rounding: whether weights of 16 bits are worked on in float32.
    """

    def __init__(self, params: Sequence[Tensor] = (), *, stochastic_rounding: bool = False) -> None:
        self._params = params
        self._stochastic_rounding = stochastic_rounding

    def are_copies(self, indices: Iterable[int]) -> bool:
        """Whether any of :meth:`taken` would be no weight itself."""
        return self._stochastic_rounding and any(
            self._params[index].dtype in HALF_DTYPES for index in indices
        )

    def taken(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """This rank's parts of parameters; in float32 where they are rounded stochastically."""
        weights = {index: local(self._params[index]) for index in indices}
        if not self._stochastic_rounding:
            return weights
        return {
            index: weight.float() if weight.dtype in HALF_DTYPES else weight
            for index, weight in weights.items()
        }

    def round_back(self, weights: Mapping[int, Tensor], steps: Sequence[int]) -> None:
        """Rounds weights that were worked on as copies, once for decay and updates together.

        Args:
            steps: done so far, per parameter.
        """
        for index, weight in weights.items():
            param = local(self._params[index])
            if weight.dtype != param.dtype:
                param.copy_(round_stochastically(weight, param.dtype, steps[index] + 1))
