"""What a call of an attention layer forgets, in figures; computed beside the call, from a part of it.

Memory is linear in the number of keys: scores are made for blocks of rows. Nothing is drawn from a random generator.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocasting, normalising
from ..backends import Call, Threshold
from ..backends import eager_form as eager
from ..backends.arguments import batch_shape
from ..specs import Sep

#: So many items of a batch are looked at.
ITEMS = 4
#: So many scores are looked at, or :data:`ROWS` rows of each head if that is more; rows are taken at even distances.
SCORES = 1 << 20
ROWS = 16
#: So many scores are in memory at once, or one row of each head if that is more.
BLOCK = 1 << 18


class Figures(NamedTuple):
    """What was forgotten, one number per head; NaN where there is nothing to take a share or a mean of.

    Attributes:
        forgotten: The share of the keys that count which were forgotten.
        empty_rows: The share of the rows with a key that counts which forgot all of them.
        entropy: That of the kept weights, scaled to sum to 1; in nats, a mean over the rows that keep a key.
        forgotten_weight: The part of the denominator that is the forgotten keys'; a mean over the rows.
    """

    forgotten: Tensor
    empty_rows: Tensor
    entropy: Tensor
    forgotten_weight: Tensor


class _Sums:
    """Adds up blocks of rows (items, heads, rows, S)."""

    def __init__(self, heads: int, device: torch.device, sep: Sep) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which the former does not have
        self.sep = sep
        # Keys, forgotten keys, rows, empty rows, rows that keep a key; sums of entropies and of weights.
        self.sums = torch.zeros(7, heads, dtype=dtype, device=device)

    def add(self, forgotten: Tensor, kept: Tensor, excluded: Tensor | None) -> None:
        """Add a block.

        Args:
            forgotten: D(s), -inf where a key is excluded.
            kept: D'(s) != 0.
            excluded: Which keys do not count, of the same shape; None: all count.
        """
        counted = torch.ones_like(kept) if excluded is None else ~excluded
        kept = kept & counted
        rows, keeps = counted.any(-1), kept.any(-1)
        alpha, n = self.sep
        softmax = alpha == 1.0 and n == 0.0
        weights = forgotten.softmax(-1) if softmax else normalising.normalise(forgotten, alpha, n)
        lost = weights.masked_fill(kept | ~counted, 0.0).sum(-1)
        if alpha == 1.0:  # whatever is added to the denominator
            shares = forgotten.masked_fill(~kept, -math.inf).softmax(-1)
        else:
            shares = weights.masked_fill(~kept, 0.0)
            shares = shares / shares.sum(-1, keepdim=True)
        entropy = torch.special.entr(shares).sum(-1)
        parts = (
            counted.sum(-1), (counted & ~kept).sum(-1), rows, rows & ~keeps, keeps,
            entropy.masked_fill(~keeps, 0.0), lost.masked_fill(~rows, 0.0),
        )  # fmt: skip
        self.sums += torch.stack([part.to(self.sums.dtype).sum((0, -1)) for part in parts])

    def figures(self) -> Figures:
        """Return the shares and means."""
        keys, forgotten, rows, empty, keeps, entropy, lost = self.sums
        return Figures(forgotten / keys, empty / rows, entropy / keeps, lost / rows)


# --- attention as a whole -------------------------------------------------------------------------------------------


def of_call(call: Call) -> Figures:
    """Return the figures of a call of the operator, from some items and rows of it.

    The threshold is taken without its noise. The median is that of all scores where there are at most :data:`SCORES`,
    and else of rows at even distances, of all items and heads.
    """
    query, key = _cast(call)
    with torch.no_grad(), autocasting.without_autocast(query.device.type):
        return _of_scored(call, query, key)


def _of_scored(call: Call, query: Tensor, key: Tensor) -> Figures:
    shape = batch_shape(query.shape[:-2], key.shape[:-2])
    query, key = query.expand(*shape, *query.shape[-2:]), key.expand(*shape, *key.shape[-2:])
    mask = call.attn_mask
    mask = None if mask is None else mask.expand(*shape, query.size(-2), key.size(-2))
    rule: Any = call.rule
    threshold: Threshold | None = rule.threshold()
    mu = None
    if threshold is not None:
        mu = _median(call, query, key, mask) if threshold.mu is None else threshold.mu
    query, key = _some_items(query), _some_items(key)
    mask = None if mask is None else _some_items(mask)
    sums = _Sums(query.size(1), query.device, call.sep)
    for rows in _blocks(query.shape[:2].numel(), query.size(2), key.size(2)):
        scores, excluded = _scores(call, query, key, mask, rows)
        if call.masking == "paper":
            excluded = None
        if threshold is None:
            forgotten, kept = _by_rule(rule, scores, excluded, call.masking)
        else:
            forgotten, kept = _above(threshold, mu, rule.empty_rows, scores, excluded)
        sums.add(forgotten, kept, None if excluded is None else excluded.expand_as(scores))
    return sums.figures()


def _cast(call: Call) -> tuple[Tensor, Tensor]:
    """Return query and key as the operator computes with them, keys repeated for their groups of queries."""
    query, key = call.query.detach(), call.key.detach()
    device = query.device.type
    if autocasting.in_autocast(device):
        dtype = torch.get_autocast_dtype(device)
        query, key = autocasting.cast(query, dtype), autocasting.cast(key, dtype)
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    return query, eager.repeat_heads(query, key) if call.enable_gqa else key


def _some_items(tensor: Tensor) -> Tensor:
    """Return (items, heads, ..., ...) of a tensor (..., heads, ..., ...), a view where that is possible."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    left = ITEMS
    for dim in range(tensor.dim() - 3):
        taken = min(max(left, 1), tensor.size(dim))
        tensor, left = tensor.narrow(dim, 0, taken), left // max(taken, 1)
    return tensor.flatten(0, -4)


def _blocks(leading: int, rows: int, keys: int) -> list[slice]:
    """Return which rows are looked at, block by block.

    Args:
        leading: Items times heads.
        rows: How many rows there are.
        keys: How many keys.
    """
    row = max(leading * keys, 1)
    stride = max(-(-rows // max(SCORES // row, ROWS)), 1)
    size = max(BLOCK // row, 1) * stride
    return [slice(start, min(start + size, rows), stride) for start in range(stride // 2, rows, size)]


def _scores(call: Call, query: Tensor, key: Tensor, mask: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return the scores of some rows, and which keys are excluded; see :func:`eager.attention_scores`."""
    if call.is_causal:
        places = torch.arange(query.size(-2), device=query.device)[rows]
        mask = torch.arange(key.size(-2), device=query.device) <= places[:, None]
    elif mask is not None:
        mask = mask[..., rows, :]
    return eager.attention_scores(query[..., rows, :], key, mask, False, call.scale)


def _median(call: Call, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return the median of the scores that count, or of those of some rows."""
    leading = query.shape[:-2].numel()
    found = []
    for rows in _blocks(leading, query.size(-2), key.size(-2)):
        scores, excluded = _scores(call, query, key, mask, rows)
        if excluded is None or call.masking == "paper":
            found.append(scores.flatten())
        else:
            found.append(scores[~excluded.expand_as(scores)])
    scores = torch.cat(found) if found else query.new_zeros(0)
    return scores.median() if len(scores) else query.new_zeros(())


def _above(
    threshold: Threshold, mu: Tensor | float | None, empty_rows: str, scores: Tensor, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return D(s) and D'(s) of a rule that keeps the scores above a threshold."""
    value = torch.as_tensor(mu, dtype=scores.dtype, device=scores.device)
    forgotten, kept = eager.forget(scores, value, threshold.bias, threshold.mu is None)
    if excluded is not None:
        forgotten, kept = eager.exclude(forgotten, kept, excluded, -1)
    if empty_rows == "keep":
        forgotten, kept = eager.keep_empty_rows(scores, forgotten, kept, excluded, -1)
    return forgotten, kept


def _by_rule(rule: Any, scores: Tensor, excluded: Tensor | None, masking: str) -> tuple[Tensor, Tensor]:
    """Return D(s) and D'(s) of any other rule, which leaves no trace in the random generators."""
    devices = [scores.device] if scores.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        forgotten, mask = rule.forget_rows(scores, excluded, False, masking, -1)
    return forgotten, mask != 0


# --- a softmax that is written out ----------------------------------------------------------------------------------


def of_scores(
    scores: Tensor, forgotten: Tensor, mask: Tensor, hidden: float | None, sep: Sep, dim: int, heads: int | None
) -> Figures:
    """Return the figures of a call around a softmax that is written out, from some items and rows of it.

    Args:
        scores: s. Keys are in one dimension; of the others the last are those of rows and, before it, of heads. Where
            the keys are not in the last one of two, the other one is that of heads.
        forgotten: D(s), as it was computed.
        mask: D'(s), as it was computed.
        hidden: The score at and below which a key is excluded; None: none is.
        sep: The normalisation.
        dim: The dimension of the keys.
        heads: The number of heads, where those of three dimensions may have items and heads in the first.
    """
    half = scores.dtype in (torch.float16, torch.bfloat16)
    parts = [_as_rows(part.detach(), dim, heads) for part in (scores, forgotten, mask.expand_as(scores))]
    sums = _Sums(parts[0].size(1), scores.device, sep)
    with torch.no_grad(), autocasting.without_autocast(scores.device.type):
        for rows in _blocks(parts[0].shape[:2].numel(), *parts[0].shape[2:]):
            block, computed, kept = (part[:, :, rows] for part in parts)
            excluded = None if hidden is None else block <= hidden
            sums.add(computed.float() if half else computed, kept != 0, excluded)
    return sums.figures()


def _as_rows(tensor: Tensor, dim: int, heads: int | None) -> Tensor:
    """Return (items, heads, L, S) of scores; some of the items."""
    by_head = tensor.dim() == 2 and dim % 2 == 0
    tensor = tensor.movedim(dim, -1)
    if by_head:
        tensor = tensor.unsqueeze(-2)
    elif tensor.dim() == 3 and heads and tensor.size(0) % heads == 0:
        tensor = tensor.reshape(-1, heads, *tensor.shape[1:])
    while tensor.dim() < 2:
        tensor = tensor.unsqueeze(0)
    return _some_items(tensor)
