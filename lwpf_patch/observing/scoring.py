"""The scores of a call, made again beside it, and their dimensions in one order: items, heads, rows, keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autocasting
from ..backends import Call
from ..backends import eager_form as eager
from ..backends.arguments import batch_shape


def cast(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return query, key and mask as the operator computes with them.

    Keys are repeated for their groups of queries, and all three have the same leading dimensions.
    """
    query, key = call.query.detach(), call.key.detach()
    device = query.device.type
    if autocasting.in_autocast(device):
        dtype = torch.get_autocast_dtype(device)
        query, key = autocasting.cast(query, dtype), autocasting.cast(key, dtype)
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    if call.enable_gqa:
        key = eager.repeat_heads(query, key)
    shape = batch_shape(query.shape[:-2], key.shape[:-2])
    query, key = query.expand(*shape, *query.shape[-2:]), key.expand(*shape, *key.shape[-2:])
    mask = call.attn_mask
    return query, key, None if mask is None else mask.detach().expand(*shape, query.size(-2), key.size(-2))


def scores_of_rows(
    call: Call, query: Tensor, key: Tensor, mask: Tensor | None, rows: slice | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of some rows, and which keys are excluded; see :func:`eager_form.attention_scores`."""
    if call.is_causal:
        places = torch.arange(query.size(-2), device=query.device)[rows]
        mask = torch.arange(key.size(-2), device=query.device) <= places[:, None]
    elif mask is not None:
        mask = mask[..., rows, :]
    return eager.attention_scores(query[..., rows, :], key, mask, False, call.scale)


def heads_before_rows(tensor: Tensor, layout: str, heads: int | None) -> Tensor:
    """Return (..., heads, L, N) of a query, a key, a mask or scores.

    Args:
        tensor: The tensor, of at least two dimensions; the last one is that of keys or features.
        layout: What the dimensions of the layer's scores are; see :class:`lwpf_patch.attention.owned.OwnedFuncD`.
        heads: How many heads the layer says that it has; None: it does not say.
    """
    if tensor.dim() == 2:
        return tensor.unsqueeze(0)
    if tensor.dim() == 3:
        is_merged = layout != "bqk" and heads is not None and tensor.size(0) % heads == 0
        return _split_heads(tensor, heads) if is_merged and heads else tensor.unsqueeze(1)
    if layout == "(bh)wqk" and heads and tensor.size(0) % heads == 0:
        return _split_heads(tensor, heads).movedim(1, -3)
    if layout == "bhwqk" and tensor.dim() == 5:
        return tensor.movedim(1, -3)
    return tensor.movedim(2, 1) if layout == "bqhk" else tensor


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.reshape(tensor.size(0) // heads, heads, *tensor.shape[1:])


def scores_by_head(scores: Tensor, dim: int, layout: str, heads: int | None) -> Tensor:
    """Return (..., heads, L, S) of scores.

    Args:
        scores: The scores. Where they have two dimensions and the keys are not in the last one, the other one is that
            of heads.
        dim: The dimension of the keys.
        layout: As for :func:`heads_before_rows`.
        heads: As there.
    """
    by_head = scores.dim() == 2 and dim % 2 == 0
    scores = scores.movedim(dim, -1)
    if by_head:
        return scores.unsqueeze(-2)
    return heads_before_rows(scores if scores.dim() > 1 else scores.unsqueeze(0), layout, heads)
