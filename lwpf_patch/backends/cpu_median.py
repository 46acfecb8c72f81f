"""The exact median of all scores, without all scores.

A sample tells roughly where it is; one pass over the tiles counts what lies below and collects what lies there.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_primitives import keep, keep_inside
from .eager_form import lowest
from .tiles import Tile, TiledScores

#: As many positions of scores that are equal to the median are noted; the backward pass looks for more by itself.
TIES = 64
#: So many numbers are searched without another sample.
WITHOUT_ANOTHER_SAMPLE = 1 << 15
#: Size of the sample, as a power of the number of scores. Where they are not made yet, each takes a product of its own.
SAMPLED, SAMPLED_OF_MADE = 0.6, 0.65
#: Width of the bracket to either side, in roots of the sample's size: 3.5 standard deviations of the median's rank, so
#: that one in 2,000 brackets misses the median, and another is tried.
MARGIN = 1.75
#: Up to here float32 holds every whole number.
EXACT = 1 << 24


class _Collected(NamedTuple):
    """The scores of a tile within the bracket.

    Attributes:
        tile: The tile.
        values: The scores.
        words: Flat positions in the tile of groups of scores.
        chosen: Which of the scores of these groups, one after another, the values are.
        size: How many scores a group has.
    """

    tile: Tile
    values: Tensor
    words: Tensor
    chosen: Tensor
    size: int

    def positions(self, tiled: TiledScores, which: Tensor) -> Tensor:
        """Return the flat positions of some of the values among all scores, (B H, L, S)."""
        chosen = self.chosen[which]
        place = self.words[chosen // self.size] * self.size + chosen % self.size
        tile, rows = self.tile, self.tile.rows.stop - self.tile.rows.start
        row, column = place // tile.keys, place % tile.keys
        row = (tile.batch.start + row // rows) * tiled.query.shape[1] + tile.rows.start + row % rows
        return row * tiled.key.shape[1] + column


class _Count(NamedTuple):
    """How many scores count, lie below the bracket, and within; and these, tile by tile."""

    valid: int
    below: int
    within: int
    collected: list[_Collected]


def median(tiled: TiledScores, ties: Tensor, scratch: Tensor) -> float:
    """Find the median, the lower of two middle values.

    Args:
        tiled: What makes the scores.
        ties: (TIES + 1): gets the number of scores that are equal to the median, and the flat positions of these among
            (B H, L, S); -1 in place of the first position where they are not known.
        scratch: Room for the scores of a tile.

    Returns:
        The median; 0 if every score is excluded, NaN if one that counts is NaN.
    """
    if not tiled.query.shape[:2].numel() * tiled.key.shape[1]:
        return 0.0
    sample, finite = _sample(tiled), _are_numbers(tiled)
    for attempt in itertools.count():
        margin = MARGIN * math.sqrt(len(sample)) * 4**attempt
        low, high, flat = _bracket(sample, (len(sample) - 1) // 2, margin)
        found = _count(tiled, low, high, scratch, not flat, finite)
        if found is None:
            return math.nan
        if found.valid == 0:
            return 0.0
        rank = (found.valid - 1) // 2 - found.below
        if not 0 <= rank < found.within:
            if low == -math.inf and high == math.inf:  # which it does not lie strictly between
                break
            continue
        if flat:
            ties[0], ties[1] = found.within, -1
            return sample.kthvalue((len(sample) + 1) // 2).values.item()
        value = _kth_value(torch.cat([part.values for part in found.collected]), rank)
        equal = torch.cat([part.positions(tiled, part.values == value) for part in found.collected])
        ties[0] = len(equal)
        ties[1 : 1 + min(len(equal), TIES)] = equal[:TIES]
        return value
    return math.copysign(math.inf, rank)


def _are_numbers(tiled: TiledScores) -> bool:
    """Return whether no score can be NaN: whether those without a mask are finite, and the mask holds none."""
    largest = tiled.query.norm(dim=-1).amax() * tiled.key.norm(dim=-1).amax() * max(1.0, abs(tiled.scale))
    if not largest.item() < torch.finfo(tiled.query.dtype).max:
        return False
    mask = tiled.mask
    return mask is None or mask.dtype == torch.bool or not mask.isnan().any()


def _count(
    tiled: TiledScores, low: float, high: float, scratch: Tensor, collect: bool, are_numbers: bool
) -> _Count | None:
    """Count the scores below and strictly within a bracket, and collect those within if that is wanted.

    Returns:
        What was counted; None if a score that counts is NaN.
    """
    one = tiled.query.new_ones(())
    valid = below = within = 0
    collected = []
    for tile in tiled.tiles():
        scores, excluded = tiled.scores(tile)
        count = scores.numel()
        if excluded is not None:
            scores.masked_fill_(excluded, -math.inf)  # in no bracket
            count -= int(excluded.expand_as(scores).count_nonzero())
        if not are_numbers and scores.isnan().any():
            return None
        ones, marks = one.expand_as(scores), scratch[: scores.numel()].view(scores.shape)
        # These two count several times as fast as comparisons do: 1 for what is > low, 1 for what is in between.
        valid, below = valid + count, below + count - _sum(keep(ones, scores, low, out=marks))
        inside = keep_inside(ones, scores, low, high, out=marks)
        count = _sum(inside)
        within += count
        if count and collect:
            collected.append(_collect(tile, scores.reshape(-1).contiguous(), inside.view(-1), low, high))
    return _Count(valid, below, within, collected)


def _sum(marks: Tensor) -> int:
    """Return how many of the marks are 1, the others 0; float32 counts no further than to EXACT."""
    return sum(int(part.sum().item()) for part in torch.split(marks.view(-1), EXACT))


def _collect(tile: Tile, scores: Tensor, inside: Tensor, low: float, high: float) -> _Collected:
    """Collect the scores within the bracket, of which there are few.

    What is not 0 is searched for in words of 8 bytes, twice as fast as number by number.
    """
    even = (len(scores) * scores.itemsize) % 8 == (scores.storage_offset() * scores.itemsize) % 8 == 0
    word = torch.int64 if even else torch.int32
    words = inside.view(word).nonzero().squeeze(1)
    values = scores.view(word).take(words).view(scores.dtype)
    chosen = ((values > low) & (values < high)).nonzero().squeeze(1)
    return _Collected(tile, values.take(chosen), words, chosen, word.itemsize // scores.itemsize)


def _kth_value(values: Tensor, rank: int) -> float:
    """Return the value of a rank, from 0 on."""
    generator = torch.Generator().manual_seed(0)
    while len(values) > WITHOUT_ANOTHER_SAMPLE:
        sample = values[torch.randint(len(values), (WITHOUT_ANOTHER_SAMPLE // 8,), generator=generator)]
        low, high, flat = _bracket(sample, rank * len(sample) // len(values), MARGIN * math.sqrt(len(sample)))
        inside = (values > low) & (values < high)
        below = int((values <= low).sum())
        count = int(inside.sum())
        if flat or not below <= rank < below + count:
            break
        values, rank = values[inside], rank - below
    return values.kthvalue(rank + 1).values.item()


def _sample(tiled: TiledScores) -> Tensor:
    """Draw some scores."""
    batch, length, keys = tiled.query.shape[0], tiled.query.shape[1], tiled.key.shape[1]
    size = int((batch * length * keys) ** (SAMPLED if tiled.made is None else SAMPLED_OF_MADE))
    generator = torch.Generator().manual_seed(batch * length * keys)  # of its own: the script's draws stay the same
    b, i, j = (torch.randint(high, (size,), generator=generator) for high in (batch, length, keys))
    if tiled.made is None:
        scores = (tiled.query[b, i] * tiled.key[b, j]).sum(-1) * tiled.scale
    else:
        scores = tiled.made.take((b * length + i) * keys + j)
    if tiled.is_causal:
        scores = scores[j <= i]
    elif tiled.mask is not None:
        mask = tiled.mask
        at = (b // tiled.heads, b % tiled.heads, i, j)
        drawn = mask[tuple(index if extent > 1 else 0 for index, extent in zip(at, mask.shape, strict=True))]
        drawn = drawn.expand(size)
        if mask.dtype == torch.bool:
            scores = scores[drawn]
        else:
            scores = (scores if tiled.made is not None else scores + drawn)[drawn > lowest(mask.dtype)]
    return scores


def _bracket(sample: Tensor, rank: int, margin: float) -> tuple[float, float, bool]:
    """Return bounds strictly between which the number of some rank lies, most likely.

    Args:
        sample: A sample.
        rank: Where in the sample, sorted, it should be.
        margin: How many of the sample to go to either side from there.

    Returns:
        The bounds, and whether they hold one value only: then most numbers are the same, and need not be collected.
    """
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    if first < 0 or last >= len(sample):
        return -math.inf, math.inf, False
    low, high = (sample.kthvalue(number + 1).values for number in (first, last))
    infinity = torch.full_like(low, math.inf)
    return low.nextafter(-infinity).item(), high.nextafter(infinity).item(), bool(low == high)
