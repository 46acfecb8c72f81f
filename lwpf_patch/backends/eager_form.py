"""The readable reference: attention as the papers write it, step by step, with the scores in memory.

Plain functions that torch.jit.script compiles too. Shapes: B any batch dimensions, L queries, S keys, E features.
"""

import torch
from torch import Tensor

from .. import normalising


def lowest(dtype: torch.dtype) -> float:
    """Return the value at and below which an additive mask excludes a key: half the most negative finite number.

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
    """Repeat the heads of keys or values for grouped queries, as many as the query has.

    Where there are none to repeat, zeros stand in: each of the query's rows gives 0 then, as in SDPA.
    """
    heads = tensor.size(-3)
    if heads == 0:
        return tensor.sum(dim=-3, keepdim=True).repeat_interleave(query.size(-3), -3)
    return tensor.repeat_interleave(query.size(-3) // heads, -3)


def factor_of_scores(query: Tensor, scale: float | None) -> float:
    """Return the factor of the scores: ``scale``, or ``E ** -0.5`` for None, which is 1 without a feature."""
    if scale is not None:
        return scale
    return query.size(-1) ** -0.5 if query.size(-1) > 0 else 1.0


def attention_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the scores ``s = scale * q k^T (+ mask)``.

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
    scores = (query * factor_of_scores(query, scale)) @ key.transpose(-2, -1)
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


def find_threshold(scores: Tensor, excluded: Tensor | None, mu: float | None) -> Tensor:
    """Compute PFU's threshold without its noise.

    Args:
        scores: s, (B, L, S).
        excluded: Boolean, broadcastable to (B, L, S): not counted by the median. None: every score counts.
        mu: The threshold; None: the median of all scores.

    Returns:
        A scalar tensor of the scores' dtype. NaN if it is the median and a score that counts is NaN.
    """
    if mu is not None:
        return torch.full((), mu, dtype=scores.dtype, device=scores.device)
    if excluded is None:
        return scores.median()
    counted = scores.masked_fill(excluded, float("nan")).nanmedian()
    broken = (scores.isnan() & ~excluded).any()
    return counted.masked_fill(broken, float("nan"))


def forget(scores: Tensor, threshold: Tensor, bias: float | None, threshold_may_be_nan: bool) -> tuple[Tensor, Tensor]:
    """Compute D and D' of PFU, for which a tie is forgotten and a NaN is not hidden.

    Args:
        scores: s, (B, L, S).
        threshold: The threshold, noise included, a scalar.
        bias: What a forgotten score becomes; None: the threshold.
        threshold_may_be_nan: Whether a NaN among the scores makes the threshold NaN. Then so is all that is computed.

    Returns:
        D(s) and D'(s), (B, L, S); the latter boolean.
    """
    kept = scores > threshold
    forgotten = threshold if bias is None else torch.full_like(threshold, bias)
    if threshold_may_be_nan:  # no score is above it then, a NaN neither
        if bias is not None:
            forgotten = forgotten.masked_fill(threshold.isnan(), float("nan"))
        return torch.where(kept, scores, forgotten), kept
    return torch.where(scores <= threshold, forgotten, scores), kept


def exclude(forgotten: Tensor, mask: Tensor, excluded: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Keep excluded keys out of the denominator (-inf) and out of the values (mask False).

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
    if mask.dtype == torch.bool:  # ONNX's runtimes choose among numbers only
        return forgotten, mask & ~excluded
    return forgotten, mask.masked_fill(excluded, False)


def keep_empty_rows(
    scores: Tensor, forgotten: Tensor, mask: Tensor, excluded: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Have the rows that would forget every key forget none.

    Args:
        scores: s, (B, L, S).
        forgotten: D(s), (B, L, S).
        mask: D'(s), (B, L, S).
        excluded: Boolean, broadcastable to (B, L, S); None: no key is. A row with all keys excluded stays as it is.
        dim: The dimension of the keys.

    Returns:
        The two, corrected.
    """
    kept = (mask != 0) | forgotten.isnan()  # a row with a NaN is NaN
    rows = kept.any(dim=dim, keepdim=True).logical_not()
    if excluded is not None:
        rows = rows & excluded.all(dim=dim, keepdim=True).logical_not()
        scores = scores.masked_fill(excluded, float("-inf"))
    forgotten = torch.where(rows, scores, forgotten)
    if excluded is not None:
        rows = rows & ~excluded
    return forgotten, mask | rows if mask.dtype == torch.bool else torch.where(rows, torch.ones_like(mask), mask)


def retrieve(forgotten: Tensor, mask: Tensor, value: Tensor, dropout_p: float, alpha: float, n: float) -> Tensor:
    """Weigh the values: a forgotten key keeps ``exp(D(s))`` in the denominator but gives no value.

    Args:
        forgotten: D(s), (B, L, S).
        mask: D'(s), (B, L, S).
        value: (B, S, Ev).
        dropout_p: Probability that a weight is dropped.
        alpha: Of the normalisation; 1 is the softmax.
        n: What is added to the denominator of the softmax.

    Returns:
        The output, (B, L, Ev).
    """
    plain = alpha == 1.0 and n == 0.0  # as hosts do it themselves, bit for bit
    weights = forgotten.softmax(dim=-1) if plain else normalising.normalise(forgotten, alpha, n)
    if dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout_p, True)
    weights = mask * weights
    return weights @ value


def above_threshold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor | None,
    dropped: Tensor | None,
) -> Tensor:
    """Compute attention as the fused backends do, from what they are given: for their second derivatives.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        mask: Broadcastable to (B, L, S), boolean or additive, or None.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores.
        mu: The threshold without noise; None: the median of all scores.
        bias: What a forgotten score becomes; None: the threshold.
        n: What is added to the denominator.
        eps: The noise that was added to the threshold, a scalar; None: none.
        dropped: What the weights are multiplied with by dropout, (B, L, S); None: none.

    Returns:
        The output, (B, L, Ev).
    """
    scores, excluded = attention_scores(query, key, mask, is_causal, scale)
    threshold = find_threshold(scores, excluded, mu)
    if eps is not None:
        threshold = threshold + eps.to(scores.dtype)
    forgotten, kept = forget(scores, threshold, bias, mu is None)
    if excluded is not None:
        forgotten, kept = exclude(forgotten, kept, excluded, -1)
    return retrieve(forgotten, kept if dropped is None else kept * dropped, value, 0.0, 1.0, n)
