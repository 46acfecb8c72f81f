"""What the operator does to its arguments before a backend sees them: checks, and the casts of autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def in_autocast(device: str) -> bool:
    """Return whether autocast is on for a kind of device; some, such as meta, do not know it."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does for SDPA: every floating tensor but float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    """Check the arguments of the operator.

    Raises:
        RuntimeError: Shapes, dtypes or devices that do not go together, as SDPA raises it.
    """
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if tensor.dim() < 2:
            raise RuntimeError(
                f"lwpf_attention: {name} must have at least 2 dimensions, got shape {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"lwpf_attention: {name} must be of a floating dtype, got {tensor.dtype}")
    if not query.dtype == key.dtype == value.dtype and not in_autocast(query.device.type):
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must have the same dtype, got {got}")
    if not query.device == key.device == value.device:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must be on the same device, got {got}")
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        got = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named)
        raise RuntimeError(
            "lwpf_attention: query (..., L, E), key (..., S, E) and value (..., S, Ev) must agree in E and S, got "
            + got
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"lwpf_attention: dropout_p must be a probability, got {dropout_p}")
    if attn_mask is None:
        return
    if is_causal:
        raise RuntimeError("lwpf_attention: attn_mask and is_causal=True exclude each other; put causality in the mask")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise RuntimeError(f"lwpf_attention: attn_mask must be boolean or floating, got {attn_mask.dtype}")
    wanted = (query.size(-2), key.size(-2))
    for size, extent in zip(reversed(attn_mask.shape), reversed(wanted), strict=False):
        if size not in (1, extent):
            raise RuntimeError(
                f"lwpf_attention: attn_mask must be broadcastable to (..., L, S) = (..., {wanted[0]}, {wanted[1]}), "
                f"got shape {list(attn_mask.shape)}"
            )
    if attn_mask.device != query.device:
        raise RuntimeError(f"lwpf_attention: attn_mask is on {attn_mask.device}, query on {query.device}")
