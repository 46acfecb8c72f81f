"""The checks of the operator's arguments before a backend sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocasting import in_autocast
from ..backends import Call
from ..backends.arguments import batch_shape


def with_fitting_mask(call: Call) -> Call:
    """Return a call whose mask has no more dimensions than the scores, where SDPA takes one that has.

    SDPA computes three dimensions as four, the first of size 1; a mask may have all of them.
    """
    mask = call.attn_mask
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.size(0) != 1 or not _TAKES_FOUR_DIMENSIONS:
        return call
    dimensions = [each.dim() for each in (call.query, call.key, call.value) if isinstance(each, Tensor)]
    return call._replace(attn_mask=mask.squeeze(0)) if dimensions == [3, 3, 3] else call


def _takes_four_dimensions() -> bool:
    """Return whether SDPA does so; that of PyTorch 2.9 does not."""
    x = torch.zeros(1, 1, 1, device="cpu")
    try:
        F.scaled_dot_product_attention(x, x, x, torch.zeros(1, 1, 1, 1, device="cpu"))
    except RuntimeError:
        return False
    return True


_TAKES_FOUR_DIMENSIONS = _takes_four_dimensions()


def check_inputs(call: Call) -> None:
    """Check the arguments of a call of the operator.

    Raises:
        TypeError: Something else than a tensor, a number or a boolean where SDPA wants one.
        RuntimeError: Shapes, dtypes or devices that do not go together, as SDPA raises it.
        IndexError: Heads to be shared, and a tensor without a dimension of heads.
    """
    query, key, value = call.query, call.key, call.value
    named = (("query", query), ("key", key), ("value", value))
    _check_types(call, named)
    for name, tensor in named:
        if tensor.dim() < 2:
            raise RuntimeError(
                f"lwpf_attention: {name} must have at least 2 dimensions, got shape {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"lwpf_attention: {name} must be of a floating dtype, got {tensor.dtype}")
    autocast = in_autocast(query.device.type)
    if not query.dtype == key.dtype == value.dtype and not autocast:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must have the same dtype, got {got}")
    if not query.device == key.device == value.device:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must be on the same device, got {got}")
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise RuntimeError(
            "lwpf_attention: query (..., L, E), key (..., S, E) and value (..., S, Ev) must agree in E and S, got "
            + _shapes(named)
        )
    if call.enable_gqa:
        _check_heads(named)
    if not 0.0 <= call.dropout_p <= 1.0:
        raise RuntimeError(f"lwpf_attention: dropout_p must be a probability, got {call.dropout_p}")
    if call.attn_mask is None:
        return
    if call.is_causal:
        raise RuntimeError("lwpf_attention: attn_mask and is_causal=True exclude each other; put causality in the mask")
    _check_mask(call, call.attn_mask, autocast)


def _check_types(call: Call, named: tuple[tuple[str, Any], ...]) -> None:
    for name, tensor in (*named, ("attn_mask", call.attn_mask)):
        if not isinstance(tensor, Tensor) and (name != "attn_mask" or tensor is not None):
            raise TypeError(f"lwpf_attention: {name} must be a tensor, got {type(tensor).__name__}")
    numbers: tuple[tuple[str, Any], ...] = (("dropout_p", call.dropout_p), ("scale", call.scale))
    for name, number in numbers:
        # Of tensors and NumPy's numbers PyTorch takes those without a dimension.
        if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)) and getattr(number, "ndim", None) != 0:
            if name == "scale" and number is None:
                continue
            raise TypeError(f"lwpf_attention: {name} must be a number, got {type(number).__name__}")
    for name, flag in (("is_causal", call.is_causal), ("enable_gqa", call.enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"lwpf_attention: {name} must be True or False, got {type(flag).__name__}")


def _check_heads(named: tuple[tuple[str, Tensor], ...]) -> None:
    if any(tensor.dim() < 3 for _, tensor in named):
        raise IndexError(f"lwpf_attention: enable_gqa needs a dimension of heads, (..., H, L, E); got {_shapes(named)}")
    heads = named[0][1].size(-3)
    # No head at all can be shared by any number of them: there is nothing to attend to.
    if any(tensor.size(-3) > 0 and heads % tensor.size(-3) != 0 for _, tensor in named):
        raise RuntimeError(
            "lwpf_attention: with enable_gqa the numbers of heads of key and value must divide that of the query, got "
            + _shapes(named)
        )


def _check_mask(call: Call, attn_mask: Tensor, autocast: bool) -> None:
    query, key = call.query, call.key
    dtype = attn_mask.dtype
    fits = dtype in (torch.bool, torch.float32, query.dtype)
    if autocast and attn_mask.is_floating_point():  # which casts all but float64
        fits = (dtype == torch.float64) == (query.dtype == torch.float64)
    if not fits:
        raise RuntimeError(
            f"lwpf_attention: attn_mask must be boolean, float32 or of the query's dtype {query.dtype}, got {dtype}"
        )
    if attn_mask.device != query.device:
        raise RuntimeError(f"lwpf_attention: attn_mask is on {attn_mask.device}, query on {query.device}")
    wanted: tuple[int, ...] = (query.size(-2), key.size(-2))
    if attn_mask.dim() > 2:
        of_key = key.shape[:-2]
        if call.enable_gqa:
            of_key = torch.Size((*key.shape[:-3], query.size(-3)))
        wanted = (*batch_shape(query.shape[:-2], of_key), *wanted)
    common = min(attn_mask.dim(), len(wanted))
    # Of equal lengths, as torch.compile wants them.
    sizes = zip(attn_mask.shape[attn_mask.dim() - common :], wanted[len(wanted) - common :], strict=True)
    if attn_mask.dim() > max(2, len(wanted)) or any(size not in (1, extent) for size, extent in sizes):
        raise RuntimeError(
            "lwpf_attention: attn_mask must be broadcastable to the scores, (..., L, S) = "
            f"(..., {', '.join(map(str, wanted))}), got shape {list(attn_mask.shape)}"
        )


def _shapes(named: tuple[tuple[str, Tensor], ...]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named)
