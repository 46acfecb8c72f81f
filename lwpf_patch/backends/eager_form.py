"""The readable reference: attention as the papers write it, step by step, with the scores in memory.

Plain functions that torch.jit.script compiles too. Shapes: B any batch dimensions, L queries, S keys, E features.
"""

import torch
from torch import Tensor

from .. import sep


def lowest(dtype: torch.dtype) -> float:
    """Returns the value at and below which an additive mask excludes a key: half the most negative finite number.

    Hosts mask with -inf or with ``finfo(dtype).min``, to which a score may still be added.
    """
    if dtype == torch.float16:
        return -32752.0
    if dtype == torch.float64:
        return -8.98846567431158e307
    return -1.69e38  # float32, and bfloat16 with the same exponents


def prepare(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Bring query, key and value to the dtype to compute in, and to as many heads as the query has.

    Thresholds and exponentials of half precision are computed in float32.
    """
    if query.dtype == torch.float16 or query.dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key, value = repeat_heads(query, key), repeat_heads(query, value)
    return query, key, value


def repeat_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Repeats the heads of keys or values for grouped queries, as many as the query has."""
    return tensor.repeat_interleave(query.size(-3) // tensor.size(-3), -3)


def attention_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Computes the scores ``s = scale * q k^T (+ mask)``.

    The query is scaled first, as hosts do in their own eager code, so that a func_d that forgets nothing gives their
    output bit for bit.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        attn_mask: Boolean (True takes part) or additive, broadcastable to (B, L, S).
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores, None for ``E ** -0.5``.

    Returns:
        The scores (B, L, S), -inf where a key is excluded, and a boolean tensor broadcastable to them that marks the
        excluded keys; None if there can be none.
    """
    factor = query.size(-1) ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        excluded = ~allowed
        return scores.masked_fill(excluded, float("-inf")), excluded
    if attn_mask is None:
        return scores, None
    if attn_mask.dtype == torch.bool:
        excluded = ~attn_mask
        return scores.masked_fill(excluded, float("-inf")), excluded
    return scores + attn_mask.to(scores.dtype), attn_mask <= lowest(attn_mask.dtype)


def exclude(forgotten: Tensor, mask: Tensor, excluded: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Keeps excluded keys out of the denominator (-inf) and out of the values (mask False).

    A row with no key left gets finite scores, so that its softmax is a number, its output 0 and its gradient 0.

    Args:
        forgotten: D(s), (B, L, S).
        mask: D'(s), (B, L, S).
        excluded: Boolean, broadcastable to (B, L, S).
        dim: The dimension of the keys.

    Returns:
        The two, corrected.
    """
    empty = excluded.all(dim=dim, keepdim=True)
    forgotten = forgotten.masked_fill(excluded, float("-inf")).masked_fill(empty, 0.0)
    return forgotten, mask.masked_fill(excluded, False)


def keep_empty_rows(
    scores: Tensor, forgotten: Tensor, mask: Tensor, excluded: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Has the rows that would forget every key forget none.

    Args:
        scores: s, (B, L, S).
        forgotten: D(s), (B, L, S).
        mask: D'(s), (B, L, S).
        excluded: Boolean, broadcastable to (B, L, S); None: no key is. A row with all keys excluded stays as it is.
        dim: The dimension of the keys.

    Returns:
        The two, corrected.
    """
    rows = (mask != 0).any(dim=dim, keepdim=True).logical_not()
    kept = torch.ones_like(mask)
    if excluded is not None:
        rows = rows & excluded.all(dim=dim, keepdim=True).logical_not()
        kept = kept.masked_fill(excluded, False)
        scores = scores.masked_fill(excluded, float("-inf"))
    return torch.where(rows, scores, forgotten), torch.where(rows, kept, mask)


def retrieve(forgotten: Tensor, mask: Tensor, value: Tensor, dropout_p: float, alpha: float) -> Tensor:
    """Weighs the values: a forgotten key keeps ``exp(D(s))`` in the denominator but gives no value.

    Args:
        forgotten: D(s), (B, L, S).
        mask: D'(s), (B, L, S).
        value: (B, S, Ev).
        dropout_p: Probability that a weight is dropped.
        alpha: Of the normalisation Sep; 1 is the softmax.

    Returns:
        The output, (B, L, Ev).
    """
    weights = forgotten.softmax(dim=-1) if alpha == 1.0 else sep.normalise(forgotten, alpha)
    if dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout_p, True)
    weights = mask * weights
    return weights @ value
