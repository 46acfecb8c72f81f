"""CPU: which weights dropout drops, as a hash of their place.

The C++ computes the same (``Dropout`` in ``cpu_native.cpp``), so that both passes and second derivatives drop the same
weights, whichever of them computes, in tiles of any size and with any number of threads.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(number: int, bits: int) -> int:
    """Return a number of so many bits as a signed one has it: PyTorch computes with those, and lets them overflow."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def _shifted(x: Tensor, count: int) -> Tensor:
    """Shift to the right, and zeros in."""
    return (x >> count) & ((1 << (8 * x.itemsize - count)) - 1)


def _keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Make two numbers of 32 bits for each row, by SplitMix64."""
    x = (rows + 1) * _signed(_GOLDEN, 64) + _signed(seed, 64)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB, 64)
    x = x ^ _shifted(x, 31)
    low, high = x.unsqueeze(-1).view(torch.int32).unbind(-1)
    return (low, high) if sys.byteorder == "little" else (high, low)


def dropout(seed: int, p: float, rows: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Return what dropout multiplies weights with: 0, or ``1 / (1 - p)``.

    Args:
        seed: Of the call.
        p: Probability that a weight is dropped.
        rows: (...): numbers of the rows of weights, ``item * L + row``, int64.
        keys: How many weights a row has, from the first on.
        dtype: Of the result.

    Returns:
        (..., keys).
    """
    low, high = (key.unsqueeze(-1) for key in _keys(seed, rows))
    x = torch.arange(keys, dtype=torch.int32, device="cpu") * _signed(_GOLDEN >> 32, 32) + low
    x = x.bitwise_xor_(_shifted(x, 16)).mul_(_signed(0x85EBCA6B, 32)).add_(high)  # the constants are MurmurHash3's
    x = x.bitwise_xor_(_shifted(x, 13)).mul_(_signed(0xC2B2AE35, 32))
    x = _shifted(x.bitwise_xor_(_shifted(x, 16)), 1)
    return (x >= min(int(p * 2**31), 2**31 - 1)).to(dtype).mul_(1 / (1 - p) if p < 1 else 0.0)
