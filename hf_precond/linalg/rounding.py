"""Stochastic rounding to 16 bits, with noise made of the numbers themselves.

Rounded to nearest, an update below half a unit in the last place is lost, at every step anew: bf16
has 8 bits, so weights stop moving at a relative step of 1/512, and a moving average whose decay is
0.999 never forgets. Rounded up with the probability of what is cut off, the mean is exact.

The noise is a hash of a number's own float32 bits and of the step. It needs no generator and no
state, so the same number is rounded alike wherever it is stacked, sharded or replicated, and after
a resume.
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from hf_precond.linalg.fused import fused

HALF_DTYPES = (torch.bfloat16, torch.float16)
# The finaliser of MurmurHash3: every bit of its argument turns each bit of the result half the
# time. Products wrap around, as those of int32 do.
_FACTORS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_GOLDEN_RATIO = 0x9E3779B9


def round_stochastically(x: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Returns ``x`` in bfloat16 or float16, unbiased in the mean over steps and numbers.

    Numbers that ``dtype`` holds stay as they are, so do infinities and NaN.

    Args:
        x: floating; float64 is rounded to nearest float32 first.
        step: of the training; the same number is rounded by other noise at another step.
    """
    fine, coarse = torch.finfo(torch.float32), torch.finfo(dtype)
    return _dithered(
        x.float().reshape(-1),
        _signed(step * _GOLDEN_RATIO),
        dtype=dtype,
        dropped=int(log2(coarse.eps / fine.eps)),
        # float16 has gaps of one size below this, float32 not yet.
        subnormal=coarse.tiny if coarse.tiny > fine.tiny else 0.0,
    ).view(x.shape)


@fused
def _dithered(
    x: Tensor, seed: int | Tensor, *, dtype: torch.dtype, dropped: int, subnormal: float
) -> Tensor:
    """Adds noise to the bits that are dropped, and drops them."""
    # A number added to those below it gives them all the same gap.
    offset = torch.where(x.abs() < subnormal, x.sign() * subnormal, 0.0) if subnormal else None
    bits = (x if offset is None else x + offset).view(torch.int32)
    noisy = _hashed(bits ^ seed).bitwise_and_((1 << dropped) - 1).add_(bits)
    rounded = noisy.bitwise_and_(-1 << dropped).view(torch.float32)
    if offset is not None:
        rounded = rounded - offset
    # With noise added, the bits of a NaN may be those of another number.
    return torch.where(x.isnan(), x, rounded).to(dtype)


def _hashed(bits: Tensor) -> Tensor:
    """Murmur's finaliser of int32, in place; its shifts bring in the sign, one to one all the same.

    Of the result the lower half counts.
    """
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        bits.bitwise_xor_(bits >> shift).mul_(factor)
    return bits.bitwise_xor_(bits >> 16)


def _signed(number: int) -> int:
    """The lowest 32 bits of a whole number as an int32."""
    return (number + 2**31) % 2**32 - 2**31
