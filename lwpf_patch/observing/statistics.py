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
from ..specs import Sep
from .scoring import cast, heads_before_rows, scores_by_head, scores_of_rows

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
        entropy: That of the kept weights, scaled to sum to 1; in nats, a mean over the rows that keep a weight.
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
        # Keys, forgotten keys, rows, empty rows, rows that keep a weight; sums of entropies and of weights.
        self.sums = torch.zeros(7, heads, dtype=dtype, device=device)

    def add(self, forgotten: Tensor, kept: Tensor, excluded: Tensor | None, weights: Tensor | None = None) -> None:
        """Add a block.

        Args:
            forgotten: D(s), -inf where a key is excluded.
            kept: D'(s) != 0.
            excluded: Which keys do not count, of the same shape; None: all count.
            weights: What D'(s) multiplies; None: the normalisation of D(s).
        """
        counted = torch.ones_like(kept) if excluded is None else ~excluded
        kept = kept & counted
        rows, keeps = counted.any(-1), kept.any(-1)
        alpha, n = self.sep
        if weights is None:
            softmax = alpha == 1.0 and n == 0.0
            weights = forgotten.softmax(-1) if softmax else normalising.normalise(forgotten, alpha, n)
        lost = weights.masked_fill(kept | ~counted, 0.0).sum(-1)
        weighs = keeps
        if alpha == 1.0:  # whatever is added to the denominator
            shares = forgotten.masked_fill(~kept, -math.inf).softmax(-1)
        else:
            shares = weights.masked_fill(~kept, 0.0)
            total = shares.sum(-1, keepdim=True)
            weighs = keeps & (total.squeeze(-1) != 0.0)  # sparsemax and entmax may give all weight to forgotten keys
            shares = shares / total
        entropy = torch.special.entr(shares).sum(-1)
        parts = (
            counted.sum(-1), (counted & ~kept).sum(-1), rows, rows & ~keeps, weighs,
            entropy.masked_fill(~weighs, 0.0), lost.masked_fill(~rows, 0.0),
        )  # fmt: skip
        self.sums += torch.stack([part.to(self.sums.dtype).sum((0, -1)) for part in parts])

    def figures(self) -> Figures:
        """Return the shares and means."""
        keys, forgotten, rows, empty, weighs, entropy, lost = self.sums
        return Figures(forgotten / keys, empty / rows, entropy / weighs, lost / rows)


# --- attention as a whole -------------------------------------------------------------------------------------------


def of_call(call: Call, layout: str = "", heads: int | None = None) -> Figures:
    """Return the figures of a call of the operator, from some items and rows of it.

    The threshold is taken without its noise. The median is that of all scores where there are at most :data:`SCORES`,
    and else of rows at even distances, of all items and heads.
    """
    query, key, mask = cast(call)
    query, key = heads_before_rows(query, layout, heads), heads_before_rows(key, layout, heads)
    mask = None if mask is None else heads_before_rows(mask, layout, heads)
    with torch.no_grad(), autocasting.without_autocast(query.device.type):
        return _of_scored(call, query, key, mask)


def _of_scored(call: Call, query: Tensor, key: Tensor, mask: Tensor | None) -> Figures:
    rule: Any = call.rule
    published = _hides_nothing(call)
    threshold: Threshold | None = rule.threshold()
    mu = None
    if threshold is not None:
        mu = _median(call, query, key, mask) if threshold.mu is None else threshold.mu
    query, key = _some_items(query), _some_items(key)
    mask = None if mask is None else _some_items(mask)
    sums = _Sums(query.size(1), query.device, call.sep)
    for rows in _blocks(query.shape[:2].numel(), query.size(2), key.size(2)):
        scores, excluded = scores_of_rows(call, query, key, mask, rows)
        if published:
            excluded = None
        if threshold is None or (published and threshold.mu is not None):
            forgotten, kept = _by_rule(rule, scores, excluded, call.masking)
        else:
            forgotten, kept = _above(threshold, mu, rule.empty_rows, scores, excluded)
        if published and threshold is not None and threshold.mu is None:
            forgotten = forgotten + 0.0 * scores.masked_fill(kept, 0.0)  # NaN for -inf, as the official code has it
        sums.add(forgotten, kept, None if excluded is None else excluded.expand_as(scores))
    return sums.figures()


def _hides_nothing(call: Call) -> bool:
    """Return whether hidden keys count: as published, but in plain attention, which no option of masking changes."""
    return call.masking == "paper" and not call.is_plain()


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


def _median(call: Call, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return the median of the scores that count, or of those of some rows."""
    leading = query.shape[:-2].numel()
    found = []
    for rows in _blocks(leading, query.size(-2), key.size(-2)):
        scores, excluded = scores_of_rows(call, query, key, mask, rows)
        if excluded is None or _hides_nothing(call):
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
    scores: Tensor,
    forgotten: Tensor,
    mask: Tensor,
    hidden: float | None,
    sep: Sep,
    dim: int,
    heads: int | None,
    layout: str = "",
    normalised: Tensor | None = None,
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
        layout: What their dimensions are; see :class:`lwpf_patch.attention.owned.OwnedFuncD`.
        normalised: The weights that D'(s) multiplies; None: the normalisation of D(s).
    """
    half = scores.dtype in (torch.float16, torch.bfloat16)
    given = [scores, forgotten, mask.expand_as(scores), *([] if normalised is None else [normalised])]
    parts = [_some_items(scores_by_head(part.detach(), dim, layout, heads)) for part in given]
    sums = _Sums(parts[0].size(1), scores.device, sep)
    with torch.no_grad(), autocasting.without_autocast(scores.device.type):
        for rows in _blocks(parts[0].shape[:2].numel(), *parts[0].shape[2:]):
            block, computed, kept, *weights = (part[:, :, rows] for part in parts)
            excluded = None if hidden is None else block <= hidden
            sums.add(computed.float() if half else computed, kept != 0, excluded, *weights)
    return sums.figures()
