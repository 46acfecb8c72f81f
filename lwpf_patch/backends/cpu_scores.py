"""CPU: what both passes are given, and their scores, tile by tile."""

from __future__ import annotations

import itertools
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


class Given(NamedTuple):
    """What both passes are given beside query, key and value.

    Attributes:
        scale: Factor of the products of query and key.
        mask: (B or 1, H or 1, L or 1, S), boolean or additive; None: there is none.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i sees the keys 0 to i only, where there is no mask.
        mu: The threshold without noise; None: the median of all scores.
        bias: What a forgotten score becomes; None: the threshold.
        n: What is added to the denominator.
        seed: Of dropout, (), int64; None: nothing is dropped.
    """

    scale: float
    mask: Tensor | None
    dropout_p: float
    is_causal: bool
    mu: float | None
    bias: float | None
    n: float
    seed: Tensor | None


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
        given: How they are made.
    """

    query: Tensor
    key: Tensor
    given: Given

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
                which, (*which, slice(row, last)), (*which, slice(0, min(keys, last) if self.given.is_causal else keys))
            )

    def make(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Make the scores of a tile, and the mask of the keys that are excluded, broadcastable to them."""
        scores = (self.query[tile.rows] * self.given.scale) @ self.key[tile.seen].mT
        if self.given.mask is not None:
            mask = self.of_tile(self.given.mask, tile)
            if mask.dtype == torch.bool:
                return scores, ~mask
            return scores.add_(mask), mask <= lowest(mask.dtype)
        if self.given.is_causal:
            rows = torch.arange(tile.rows[2].start, tile.rows[2].stop, device="cpu")
            return scores, torch.arange(tile.seen[2].stop, device="cpu") > rows[:, None]
        return scores, None

    def of_tile(self, mask: Tensor, tile: Tile) -> Tensor:
        """Return the part of a mask, or of its gradient, that lies over a tile."""
        places = zip(tile.scores, mask.shape, strict=True)
        return mask[tuple(where if size > 1 else slice(None) for where, size in places)]

    def dropout(self, tile: Tile) -> Tensor | None:
        """Make the dropout mask of a tile, the same in both passes; None: nothing is dropped."""
        if self.given.seed is None:
            return None
        batch, heads, length = self.query.shape[:3]
        rows = torch.arange(batch * heads * length, device="cpu").view(batch, heads, length)[tile.rows]
        return dropout(int(self.given.seed), self.given.dropout_p, rows, tile.seen[2].stop, self.query.dtype)
