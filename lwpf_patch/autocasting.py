"""Autocast: whether it is on, how it casts, and how to keep it out."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import compiling


def in_autocast(device: str) -> bool:
    """Return whether autocast is on for a kind of device, such as ``"cuda"``."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a kind of device computes without autocast."""
    return torch.autocast(device, enabled=False) if _has_autocast(device) else contextlib.nullcontext()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does for SDPA: every floating tensor but float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


@compiling.constant  # torch.compile stops at the question
def _has_autocast(device: str) -> bool:
    """Return whether a kind of device knows autocast; some, such as meta, do not."""
    return torch.amp.is_autocast_available(device)
