"""CPU: both passes tile by tile, by PyTorch's operators: where the C++ of :mod:`lwpf_patch.backends.cpu_native` is not.

The formulas are those of :mod:`lwpf_patch.backends.cpu`. Nothing the size of all scores is allocated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_dropout import dropout
from .eager_form import lowest

#: Scores in a tile: few enough for the caches, enough for products of matrices to be fast.
TILE = 1 << 19
#: Rows of a tile of one head, at least.
ROWS = 64
#: Size of the sample for the median, as a power of the number of scores.
SAMPLED = 0.6
#: Width of the bracket to either side, in roots of the sample's size: 3.5 standard deviations of the median's rank, so
#: that one in 2,000 brackets misses the median, and another is tried.
MARGIN = 1.75


class Tile(NamedTuple):
    """Some rows of scores, of some heads of some batch items.

    Attributes:
        heads: Which batch items, and which of their heads.
        rows: The same, and which queries.
        seen: The same as ``heads``, and which keys: those from the first to the last one that a query may see.
    """

    heads: tuple[slice, slice]
    rows: tuple[slice, slice, slice]
    seen: tuple[slice, slice, slice]

    @property
    def scores(self) -> tuple[slice, slice, slice, slice]:
        """Where its scores lie among all of them."""
        return (*self.rows, self.seen[2])


class Scores(NamedTuple):
    """The scores, made tile by tile.

    Attributes:
        query: (B, H, L, E).
        key: (B, H, S, E).
        scale: Factor of the products of query and key.
        mask: (B or 1, H or 1, L or 1, S), boolean or additive, or None.
        is_causal: Whether query i sees the keys 0 to i only.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    is_causal: bool

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles, which cover every score once.

        They are always the same, so that scores made again are the same bit by bit.
        """
        batch, heads, length = self.query.shape[:3]
        keys = self.key.shape[2]
        rows = max(1, min(length, max(ROWS, TILE // max(1, keys))))
        some = max(1, min(heads, TILE // max(1, rows * keys)))
        items = max(1, TILE // max(1, rows * keys * heads)) if some == heads else 1
        starts = itertools.product(range(0, batch, items), range(0, heads, some), range(0, length, rows))
        for item, head, row in starts:
            which = slice(item, item + items), slice(head, head + some)
            last = min(row + rows, length)
            yield Tile(
                which, (*which, slice(row, last)), (*which, slice(0, min(keys, last) if self.is_causal else keys))
            )

    def make(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Make the scores of a tile, and the mask of the keys that are excluded, broadcastable to them."""
        scores = (self.query[tile.rows] * self.scale) @ self.key[tile.seen].mT
        if self.mask is not None:
            mask = self.of_tile(self.mask, tile)
            if mask.dtype == torch.bool:
                return scores, ~mask
            return scores.add_(mask), mask <= lowest(mask.dtype)
        if self.is_causal:
            rows = torch.arange(tile.rows[2].start, tile.rows[2].stop, device="cpu")
            return scores, torch.arange(tile.seen[2].stop, device="cpu") > rows[:, None]
        return scores, None

    def of_tile(self, mask: Tensor, tile: Tile) -> Tensor:
        """Return the part of a mask, or of its gradient, that lies over a tile."""
        places = zip(tile.scores, mask.shape, strict=True)
        return mask[tuple(where if size > 1 else slice(None) for where, size in places)]

    def dropout(self, tile: Tile, p: float, seed: Tensor) -> Tensor:
        """Make the dropout mask of a tile, the same in both passes."""
        batch, heads, length = self.query.shape[:3]
        rows = torch.arange(batch * heads * length, device="cpu").view(batch, heads, length)[tile.rows]
        return dropout(int(seed), p, rows, tile.seen[2].stop, self.query.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward pass; arguments and results are those of ``cpu_attention``."""
    all_scores = Scores(query, key, scale, mask, is_causal)
    centre, ties = (mu, 0) if mu is not None else median(all_scores)
    threshold = torch.full((), centre, dtype=query.dtype, device="cpu")
    a = (threshold if eps is None else threshold + eps.to(query.dtype)).item()
    found = torch.tensor([a, threshold.item(), ties], dtype=torch.float64, device="cpu")
    # With a threshold that is NaN all scores are forgotten, and become NaN.
    a, b = (math.inf, math.nan) if math.isnan(a) else (a, a if bias is None else bias)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    rows = query.new_zeros(2, *query.shape[:3])
    log_n = math.log(n) if n > 0 else -math.inf
    for tile in all_scores.tiles():
        scores, excluded = all_scores.make(tile)
        forgotten = scores <= a
        weights = scores.masked_fill_(forgotten, b)
        if excluded is not None:
            forgotten |= excluded
            weights.masked_fill_(excluded, -math.inf)
        # It is -inf, and the row NaN, where no score is higher.
        highest = weights.amax(-1, keepdim=True) if weights.shape[-1] else weights.new_zeros(*weights.shape[:-1], 1)
        highest.clamp_(min=log_n)
        weights.sub_(highest).exp_()
        if excluded is not None:
            weights.masked_fill_(excluded, 0)
        total = weights.sum(-1, keepdim=True)
        if excluded is not None or not weights.shape[-1]:
            total.masked_fill_(total == 0, 1)  # a row with no key left gives 0
        added = (log_n - highest).exp_() if n > 0 else 0.0
        total += added
        weights.masked_fill_(forgotten, 0)
        if mu is None:
            rows[1][tile.rows] = 1 - ((weights.sum(-1, keepdim=True) + added) / total).squeeze(-1)
        if seed is not None:
            weights *= all_scores.dropout(tile, dropout_p, seed)
        out[tile.rows] = (weights @ value[tile.seen]).div_(total)
        rows[0][tile.rows] = total.log_().add_(highest).squeeze(-1)
    return out, rows, found


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    found: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward pass; arguments and results are those of ``cpu_attention_backward``."""
    all_scores = Scores(query, key, scale, mask, is_causal)
    a, centre, ties = found.tolist()
    if math.isnan(a) or (bias is None and a == math.inf):
        a = -math.inf  # all weights are NaN, and stay it
    log_sum, rho = rows.unbind()
    gradients = _Gradients(all_scores, value, mask_needs_grad)
    delta = (grad * out).sum(-1)
    for tile in all_scores.tiles():
        scores, excluded = all_scores.make(tile)
        forgotten = scores <= a
        if excluded is not None:
            forgotten |= excluded
        weights = scores.sub_(log_sum[tile.rows].unsqueeze(-1)).exp_().masked_fill_(forgotten, 0)
        inner = grad[tile.rows] @ value[tile.seen].mT
        used = weights
        if seed is not None:
            dropped = all_scores.dropout(tile, dropout_p, seed)
            inner *= dropped
            used = weights * dropped
        gradients.value[tile.seen] += used.mT @ grad[tile.rows]
        gradients.add(tile, inner.sub_(delta[tile.rows].unsqueeze(-1)).mul_(weights))
    if mu is None and bias is None and ties:
        # The forgotten scores become the threshold, and pass their gradient on to it; the comparison has none.
        share = -(rho * delta).sum() / ties
        for tile in all_scores.tiles():
            scores, excluded = all_scores.make(tile)
            equal = scores == centre
            if excluded is not None:
                equal &= ~excluded
            gradients.add(tile, equal * share)
    return gradients.query, gradients.key, gradients.value, gradients.mask


class _Gradients:
    """The gradients, added up over tiles."""

    def __init__(self, scores: Scores, value: Tensor, mask_needs_grad: bool) -> None:
        def zeros(like: Tensor) -> Tensor:
            return like.new_zeros(like.shape)

        self.scores = scores
        self.query, self.key, self.value = zeros(scores.query), zeros(scores.key), zeros(value)
        self.mask = zeros(scores.mask) if scores.mask is not None and mask_needs_grad else value.new_zeros(0)

    def add(self, tile: Tile, inner: Tensor) -> None:
        """Add what the gradient of the scores of a tile gives."""
        scores = self.scores
        self.query[tile.rows] += (inner @ scores.key[tile.seen]).mul_(scores.scale)
        self.key[tile.seen] += (inner.mT @ scores.query[tile.rows]).mul_(scores.scale)
        if self.mask.numel():
            part = scores.of_tile(self.mask, tile)
            part += inner.sum_to_size(part.shape)


def median(scores: Scores) -> tuple[float, int]:
    """Find the median of all scores, exactly, the lower of two middle values.

    A sample tells roughly where it is; one pass over the tiles counts what lies below and collects what lies there.

    Returns:
        The median, and how many scores are equal to it; 0 if every score is excluded, NaN if one that counts is NaN.
    """
    if not scores.query.shape[:3].numel() * scores.key.shape[2]:
        return 0.0, 0
    sample = _sample(scores)
    for attempt in itertools.count():
        low, high, flat = _bracket(sample, MARGIN * math.sqrt(len(sample)) * 4**attempt)
        valid = below = within = 0
        collected = []
        for tile in scores.tiles():
            made, excluded = scores.make(tile)
            hidden = 0
            if excluded is not None:
                made.masked_fill_(excluded, -math.inf)  # which is below all brackets
                hidden = int(excluded.expand_as(made).count_nonzero())
            if made.numel() and made.amax().isnan():
                return math.nan, 0
            above = made > low
            below += made.numel() - int(above.count_nonzero()) - hidden
            inside = above.logical_and_(made < high)
            within += int(inside.count_nonzero())
            valid += made.numel() - hidden
            if not flat:
                collected.append(made[inside])
        if not valid:
            return 0.0, 0
        rank = (valid - 1) // 2 - below
        if 0 <= rank < within:
            if flat:
                return sample.kthvalue((len(sample) + 1) // 2).values.item(), within
            values = torch.cat(collected)
            value = values.kthvalue(rank + 1).values
            return value.item(), int((values == value).sum())
        if low == -math.inf and high == math.inf:  # which it does not lie strictly between
            return math.copysign(math.inf, rank), 0
    raise AssertionError


def _sample(scores: Scores) -> Tensor:
    """Draw some scores that count."""
    shape = (*scores.query.shape[:3], scores.key.shape[2])
    total = math.prod(shape)
    generator = torch.Generator("cpu").manual_seed(total)  # of its own: the script's draws stay the same
    drawn = int(total**SAMPLED)
    b, h, i, j = (torch.randint(size, (drawn,), generator=generator, device="cpu") for size in shape)
    sample = (scores.query[b, h, i] * scores.key[b, h, j]).sum(-1) * scores.scale
    if scores.is_causal:
        sample = sample[j <= i]
    elif scores.mask is not None:
        mask = scores.mask.expand(shape)[b, h, i, j]
        sample = sample[mask] if mask.dtype == torch.bool else (sample + mask)[mask > lowest(mask.dtype)]
    return sample[~sample.isnan()]


def _bracket(sample: Tensor, margin: float) -> tuple[float, float, bool]:
    """Return bounds strictly between which the median lies, most likely.

    Args:
        sample: A sample.
        margin: How many of the sample to go to either side from its median.

    Returns:
        The bounds, and whether they hold one value only: then most numbers are the same, and need not be collected.
    """
    middle = (len(sample) - 1) // 2
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    if first < 0 or last >= len(sample):
        return -math.inf, math.inf, False
    low, high = (sample.kthvalue(number + 1).values for number in (first, last))
    infinity = torch.full_like(low, math.inf)
    return low.nextafter(-infinity).item(), high.nextafter(infinity).item(), bool(low == high)
