"""CPU: the exact median of all scores, tile by tile, in linear memory."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .cpu_scores import Scores
from .eager_form import lowest

#: Size of the sample for the median, as a power of the number of scores.
SAMPLED = 0.6
#: Width of the bracket to either side, in roots of the sample's size: 3.5 standard deviations of the median's rank, so
#: that one in 2,000 brackets misses the median, and another is tried.
MARGIN = 1.75


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
    sample = (scores.query[b, h, i] * scores.key[b, h, j]).sum(-1) * scores.given.scale
    if scores.given.is_causal:
        sample = sample[j <= i]
    elif scores.given.mask is not None:
        mask = scores.given.mask.expand(shape)[b, h, i, j]
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
