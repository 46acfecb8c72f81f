"""What the fused backends do to their arguments alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .eager_form import factor_of_scores, lowest


def batch_shape(*shapes: torch.Size) -> torch.Size:
    """Broadcast batch dimensions."""
    if all(shape == shapes[0] for shape in shapes):  # torch's function takes its time
        return shapes[0]
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]


def representable_factor(query: Tensor, scale: float | None, dtype: torch.dtype) -> float:
    """Return the factor of the scores as a dtype holds it: what is too large for it is infinite, as in SDPA."""
    factor = float(factor_of_scores(query, scale))
    return math.copysign(math.inf, factor) if abs(factor) > torch.finfo(dtype).max else factor


def flat_mask(attn_mask: Tensor, lead: Sequence[int]) -> Tensor:
    """Bring a mask to four dimensions, each of its full extent or 1.

    Args:
        attn_mask: Broadcastable to (..., L, S).
        lead: The batch dimensions of the operator, of which those before the last are one to the backends.

    Returns:
        (B or 1, H or 1, L or 1, S or 1).

    Raises:
        RuntimeError: It cannot be broadcast to the batch dimensions.
    """
    mask = attn_mask.reshape((1,) * (len(lead) + 2 - attn_mask.dim()) + attn_mask.shape)
    fits = mask.dim() == len(lead) + 2
    if not fits or any(size not in (1, extent) for size, extent in zip(mask.shape[:-2], lead, strict=True)):
        raise RuntimeError(
            f"lwpf_attention: attn_mask of shape {list(attn_mask.shape)} cannot be broadcast to the batch "
            f"dimensions {list(lead)}"
        )
    outer = mask.shape[:-3]
    if outer.numel() > 1:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
    return mask.reshape(mask.shape[:-3].numel(), *(1, 1, 1, *mask.shape)[-3:])


def widen_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert an additive mask so that what excludes a key in its own dtype does so in another."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    return mask.to(dtype).masked_fill(mask <= lowest(mask.dtype), -math.inf)
